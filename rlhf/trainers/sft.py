"""Supervised fine-tuning on assistant turns."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.batching import pack, pad_rows, plan_micro_batches
from rlhf.config import Config, TrainConfig
from rlhf.data import DrawSampler, load_sequences
from rlhf.distributed import World
from rlhf.engine import TrainEngine
from rlhf.metrics import model_shape, update_flops
from rlhf.models.forward import inputs_of
from rlhf.models.loading import load_tokenizer
from rlhf.models.scoring_head import logprobs_of
from rlhf.ops.masking import masked_sum
from rlhf.trainers.probe import fit_budget
from rlhf.trainers.run import Best, device_peak_flops, start_run
from rlhf.types import Sequence


def train_sft(config: Config, world: World, resume: str, cleanup: ExitStack) -> None:
    """Run the recipe."""
    assert config.actor.path is not None
    tokenizer = load_tokenizer(config.actor.path, config.actor.trust_remote_code)
    assert isinstance(tokenizer.pad_token_id, int)
    pad = tokenizer.pad_token_id
    sequences, report = load_sequences(config.data.train, config.data, tokenizer)
    held_out = load_sequences(config.validation.data, config.data, tokenizer)[0] if config.validation.data else []
    steps = total_steps(config, len(sequences))
    best = Best(config.validation.best_metric or "val-core/loss", config.validation.best_mode or "min", config.checkpoint.keep_best)
    rows = [[s.input_ids for s in part] for part in (sequences, held_out)]
    run = start_run(config, world, tokenizer, resume, steps, best, cleanup, *rows)
    config = run.config  # with the budget of earlier starts
    run.console.message(report.summary())
    run.expect(*(max((len(s.input_ids) for s in part), default=0) for part in (sequences, held_out)))  # (collective)
    config = run.config  # with what was left to the memory plan
    actor = run.train_engine(config.actor, "actor", steps)
    sampler = DrawSampler(len(sequences), config.seed, config.data.shuffle)
    shape = model_shape(actor.module.config)
    start = run.resume({"actor": actor}, steps)
    if start:
        sampler.load_state_dict(run.state["sampler"])
    run.compare({"actor": actor}, lambda: {"sampler": sampler.state_dict()})

    def probe(module: nn.Module, lengths: list[int], config: Config) -> Tensor:
        return nll_sum(module, [Sequence([0] * n, [True] * n, "") for n in lengths], pad, world.device, config.train.packing)

    if start < steps and run.on_gpu:
        fit_budget(run, {"actor": probe})  # (collective)
        config = run.config

    for step in range(start + 1, steps + 1):
        run.timer.start_step(step)
        batch = [sequences[d.row] for d in sampler.next(config.train.batch)]
        with run.timer.phase("update_actor"):
            total, tokens = 0.0, sum(sum(s.loss_mask[1:]) for s in batch)  # the first token has no prediction
            for part in micro_batches(batch, config.train, world):
                loss = nll_sum(actor, part, pad, world.device, config.train.packing)
                actor.backward(loss if part.weight else loss * 0.0, tokens)  # (collective)
                total += float(loss.detach()) * part.weight
            result = actor.step()  # (collective)
        metrics = {
            "train/loss": world.global_sum({"loss": total})["loss"] / tokens,
            "actor/grad_norm": result.grad_norm,
            "actor/lr": result.learning_rate,
        }
        problem = None if result.applied else "the gradient is not finite"
        good = run.judge(step, problem, metrics, {"actor": actor})  # (collective)
        measured: dict[str, float] = {}
        if held_out and (step % config.validation.every == 0 or step == steps):
            with run.timer.phase("testing"):
                measured = held_out_loss(actor, held_out, config, pad, world)  # (collective)
        metrics |= measured
        new_best = good and bool(measured) and best.offer(step, measured)
        lengths = torch.tensor([len(s.input_ids) for s in batch]).numpy()
        run.timer.add(
            "update_actor", int(lengths.sum()) // world.size, update_flops(shape, lengths, tokens, config.actor.lora is not None) / world.size
        )
        peak = device_peak_flops()
        timing = partial(run.timer.metrics, peak, step_tokens=int(lengths.sum()) // world.size, actor_memory_mb=run.meter.most_allocated_mb())
        save = new_best or (good and run.is_due(step, steps))
        run.end_step(step, metrics, {"actor": actor}, {"sampler": sampler.state_dict()}, "actor", save, timing=timing)
    run.finish()


def total_steps(config: Config, rows: int) -> int:
    return config.train.steps or math.ceil(config.train.epochs * rows / config.train.batch)


class Part(list[Sequence]):
    """Sequences of one forward; weight 0 for a filler that keeps the ranks in step (trap 23)."""

    weight: float = 1.0


def micro_batches(batch: list[Sequence], train: TrainConfig, world: World) -> list[Part]:
    """This rank's forwards over a global batch."""
    lengths = [len(s.input_ids) for s in batch]
    plan = plan_micro_batches(range(len(batch)), lengths, train.micro_batch, world.size, world.rank, train.forward_tokens)
    parts = []
    for p in plan:
        part = Part(batch[r] for r in p.rows)
        part.weight = 0.0 if p.weightless else 1.0
        parts.append(part)
    return parts


def nll_sum(forward: Callable[..., Any], part: list[Sequence], pad: int, device: torch.device, packing: bool = False) -> Tensor:
    """Summed negative log-likelihood of the trained tokens."""
    ids, lengths = pad_rows([s.input_ids for s in part], pad)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for i, s in enumerate(part):
        mask[i, : len(s.loss_mask)] = torch.tensor(s.loss_mask)
    ids, mask = ids.to(device), mask.to(device)
    if packing:
        packed = pack(lengths.tolist()).to(device)
        inputs = inputs_of(ids, packed)
        trained = (mask[packed.row, packed.positions] & (packed.positions > 0)).nonzero().squeeze(1)
        return -logprobs_of(forward, inputs, trained - 1, inputs["input_ids"][:, trained], 1.0)[0].sum()
    keep = torch.arange(ids.shape[1] - 1, device=device)
    return -masked_sum(logprobs_of(forward, inputs_of(ids, None), keep, ids[:, 1:], 1.0)[0], mask[:, 1:])


def held_out_loss(actor: TrainEngine, held_out: list[Sequence], config: Config, pad: int, world: World) -> dict[str, float]:
    """Mean negative log-likelihood per trained token. (collective)"""
    total = 0.0
    for part in micro_batches(held_out, config.train, world):
        total += float(nll_sum(actor.score, part, pad, world.device, config.train.packing)) * part.weight
    tokens = sum(sum(s.loss_mask[1:]) for s in held_out)
    loss = world.global_sum({"loss": total})["loss"] / max(1, tokens)
    return {"val-core/loss": loss, "val-aux/perplexity": math.exp(min(loss, 50.0))}
