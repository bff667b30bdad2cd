"""Reward-model training on preference pairs (Bradley-Terry)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.batching import pack, pad_rows, plan_micro_batches
from rlhf.config import Config, TrainConfig
from rlhf.data import DrawSampler, load_preferences
from rlhf.distributed import World
from rlhf.engine import TrainEngine
from rlhf.metrics import model_shape, update_flops, wilson_interval
from rlhf.models.forward import last_token_scores
from rlhf.models.loading import load_tokenizer, tensor_names
from rlhf.ops.losses import preference_loss
from rlhf.trainers.probe import fit_budget
from rlhf.trainers.run import Best, device_peak_flops, start_run
from rlhf.trainers.sft import total_steps
from rlhf.types import PreferencePair, Sequence

STATISTICS_PAIRS = 1024  # training pairs whose scores give the mean and std that later centre and scale the reward


def train_reward_model(config: Config, world: World, resume: str, cleanup: ExitStack) -> None:
    """Run the recipe."""
    role = config.reward_model
    assert role.path is not None
    tokenizer = load_tokenizer(role.path, role.trust_remote_code)
    assert isinstance(tokenizer.pad_token_id, int)
    pad = tokenizer.pad_token_id
    pairs, report = load_preferences(config.data.train, config.data, tokenizer)
    held_out = load_preferences(config.validation.data, config.data, tokenizer)[0] if config.validation.data else []
    steps = total_steps(config, len(pairs))
    best = Best(config.validation.best_metric or "val-core/pair_accuracy/mean", config.validation.best_mode or "max", config.checkpoint.keep_best)
    rows = (([len(p.chosen.input_ids), *p.chosen.input_ids, *p.rejected.input_ids] for p in part) for part in (pairs, held_out))
    run = start_run(config, world, tokenizer, resume, steps, best, cleanup, *rows)
    config = run.config  # with the budget of earlier starts
    run.console.message(report.summary())
    head = "keep" if "score.weight" in tensor_names(role.path) else "zero"
    run.console.message("the head starts " + ("as the folder holds it" if head == "keep" else "at zero"))
    run.expect(_longest(pairs), _longest(held_out))  # (collective)
    config = run.config  # with what was left to the memory plan
    role = config.reward_model
    engine = run.train_engine(role, "reward_model", steps, scalar_head=head)
    sampler = DrawSampler(len(pairs), config.seed, config.data.shuffle)
    shape = model_shape(engine.module.config, head_outputs=1)
    start = run.resume({"reward_model": engine}, steps)
    if start:
        sampler.load_state_dict(run.state["sampler"])
    run.compare({"reward_model": engine}, lambda: {"sampler": sampler.state_dict()})

    def probe(module: nn.Module, lengths: list[int], config: Config) -> Tensor:
        sides = [Sequence([0] * n, [True] * n, "") for n in lengths]
        both = [PreferencePair(a, b, "") for a, b in zip(sides[::2], sides[1::2], strict=True)]
        return torch.cat(score_pairs(module, both, pad, world.device, config.train.packing)).sum()

    if start < steps and run.on_gpu:
        fit_budget(run, {"reward_model": probe})  # (collective)
        config = run.config

    some = pairs[:: max(1, len(pairs) // STATISTICS_PAIRS)][:STATISTICS_PAIRS]  # of every source

    def statistics() -> tuple[float, float]:
        return score_mean_std(engine, some, config, pad, world)  # (collective)

    for step in range(start + 1, steps + 1):
        run.timer.start_step(step)
        batch = [pairs[d.row] for d in sampler.next(config.train.batch)]
        sums = {"loss": 0.0, "correct": 0.0, "margin": 0.0}
        with run.timer.phase("update_reward_model"):
            for part in pair_micro_batches(batch, config.train, world):
                chosen, rejected = score_pairs(engine, [batch[r] for r in part.rows], pad, world.device, config.train.packing)
                weight = torch.full_like(chosen, 0.0 if part.weightless else 1.0)
                loss = preference_loss(chosen, rejected, weight)
                engine.backward(loss, len(batch))  # (collective)
                margin = (chosen - rejected).detach()
                sums["loss"] += float(loss.detach())
                sums["correct"] += float(((margin > 0) * weight).sum())
                sums["margin"] += float((margin * weight).sum())
            result = engine.step()  # (collective)
        means = {name: value / len(batch) for name, value in world.global_sum(sums).items()}
        metrics = {
            "train/loss": means["loss"],
            "train/pair_accuracy": means["correct"],
            "train/margin": means["margin"],
            "reward_model/grad_norm": result.grad_norm,
            "reward_model/lr": result.learning_rate,
        }
        problem = None if result.applied else "the gradient is not finite"
        good = run.judge(step, problem, metrics, {"reward_model": engine})  # (collective)
        measured: dict[str, float] = {}
        if held_out and (step % config.validation.every == 0 or step == steps):
            with run.timer.phase("testing"):
                measured = pair_accuracy(engine, held_out, config, pad, world)  # (collective)
        metrics |= measured
        new_best = good and bool(measured) and best.offer(step, measured)
        lengths = torch.tensor([len(side.input_ids) for p in batch for side in (p.chosen, p.rejected)]).numpy()
        tokens = int(lengths.sum())
        run.timer.add("update_reward_model", tokens // world.size, update_flops(shape, lengths, 2 * len(batch), role.lora is not None) / world.size)
        peak = device_peak_flops()
        timing = partial(run.timer.metrics, peak, step_tokens=tokens // world.size, actor_memory_mb=run.meter.most_allocated_mb())
        save = new_best or (good and run.is_due(step, steps))
        state = {"sampler": sampler.state_dict()}
        run.end_step(step, metrics, {"reward_model": engine}, state, "reward_model", save, statistics=statistics, timing=timing)
    run.finish()


def _longest(pairs: Iterable[PreferencePair]) -> int:
    return max((len(side.input_ids) for p in pairs for side in (p.chosen, p.rejected)), default=0)


def pair_micro_batches(pairs: list[PreferencePair], train: TrainConfig, world: World) -> Any:
    """This rank's forwards over pairs; both sides of a pair go through one forward."""
    sides = [(len(p.chosen.input_ids), len(p.rejected.input_ids)) for p in pairs]
    lengths = [sum(side) if train.forward_tokens else max(side) for side in sides]
    return plan_micro_batches(range(len(pairs)), lengths, train.micro_batch, world.size, world.rank, train.forward_tokens)


def score_pairs(
    forward: Callable[..., Any], pairs: list[PreferencePair], pad: int, device: torch.device, packing: bool = False
) -> tuple[Tensor, Tensor]:
    """([b] scores of the chosen, [b] of the rejected), each read at its last token."""
    ids, lengths = pad_rows([p.chosen.input_ids for p in pairs] + [p.rejected.input_ids for p in pairs], pad)
    packed = pack(lengths.tolist()).to(device) if packing else None
    scores = last_token_scores(forward, ids.to(device), lengths.to(device), packed)
    return scores[: len(pairs)], scores[len(pairs) :]


def score_all(engine: TrainEngine, pairs: list[PreferencePair], config: Config, pad: int, world: World) -> Tensor:
    """[n, 2] float32: chosen and rejected score of every pair, on every rank. (collective)"""
    rows: list[int] = []
    results = [torch.zeros(0, 2)]
    for part in pair_micro_batches(pairs, config.train, world):
        chosen, rejected = score_pairs(engine.score, [pairs[r] for r in part.rows], pad, world.device, config.train.packing)
        if not part.weightless:
            rows += part.rows
            results.append(torch.stack([chosen, rejected], 1).cpu())
    return world.gather_indexed(rows, torch.cat(results), len(pairs))


def pair_accuracy(engine: TrainEngine, held_out: list[PreferencePair], config: Config, pad: int, world: World) -> dict[str, float]:
    """Share of held-out pairs whose chosen side scores higher, with a 95 % Wilson interval, per source and overall. (collective)"""
    scores = score_all(engine, held_out, config, pad, world)
    right = (scores[:, 0] > scores[:, 1]).tolist()
    sources = sorted({p.source for p in held_out})
    groups = {"val-core/pair_accuracy": right}
    if len(sources) > 1:
        groups |= {f"val-core/{s}/pair_accuracy": [r for r, p in zip(right, held_out, strict=True) if p.source == s] for s in sources}
    metrics = {}
    for name, outcomes in groups.items():
        mean, low, high = wilson_interval(sum(outcomes), len(outcomes))
        metrics |= {f"{name}/mean": mean, f"{name}/low": low, f"{name}/high": high, f"{name}/n": float(len(outcomes))}
    return metrics | {"val-aux/margin": float((scores[:, 0] - scores[:, 1]).mean())}


def score_mean_std(engine: TrainEngine, pairs: list[PreferencePair], config: Config, pad: int, world: World) -> tuple[float, float]:
    """Mean and standard deviation of the scores of both sides, so that PPO gets rewards of mean 0 and deviation 1. (collective)"""
    scores = score_all(engine, pairs, config, pad, world)
    return float(scores.mean()), max(float(scores.std()), 1e-6)
