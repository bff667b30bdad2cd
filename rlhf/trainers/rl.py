"""Reinforcement learning: rollout, scoring, experience, update, on all ranks in lockstep.

One step reads top to bottom in `train_rl`. Calls marked (collective) are made by all ranks together; everything else is each rank's own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.batching import MicroBatchPlan, collate, plan_micro_batches, split_minibatches
from rlhf.config import AlgorithmConfig, Config, RewardComponentConfig, critic_origin, hybrid_engine_words
from rlhf.data import DrawSampler, load_prompts
from rlhf.distributed import World
from rlhf.engine import FrozenEngine, StepResult, TrainEngine, loading_context
from rlhf.experience import (
    ExperiencePasses,
    gather_results,
    gather_rollout,
    kl_per_response,
    make_experience,
    may_train,
    needs_old_logprobs,
    needs_reference,
    scored_together,
)
from rlhf.files import write_tensors
from rlhf.guards import tensors_of, unusable
from rlhf.memory import lends_weights, releases
from rlhf.metrics import PhaseTimer, forward_flops, model_shape, rollout_flops, update_flops
from rlhf.models.compiling import compile_layers
from rlhf.models.forward import response_logprobs, response_values
from rlhf.models.loading import (
    eos_token_ids,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    model_dtype,
    read_architecture,
    score_statistics,
    without_dropout,
)
from rlhf.models.lora import adapters_off, frozen_base, load_adapter, weight_layout
from rlhf.models.scoring_head import fuse_head
from rlhf.ops.kl import KLController, kl_loss
from rlhf.ops.losses import POLICY_LOSSES, value_loss
from rlhf.ops.masking import explained_variance, masked_mean, masked_sum
from rlhf.preflight import roles
from rlhf.progress import Progress
from rlhf.rewards.compose import Rewards
from rlhf.rewards.functions import FunctionReward
from rlhf.rewards.model import RewardModel
from rlhf.rewards.pool import Pool
from rlhf.rollout import EngineSettings, HybridEngine
from rlhf.rollout.decoder import is_lean
from rlhf.rollout.engine import check_cache
from rlhf.trainers.probe import Loss, fit_budget
from rlhf.trainers.run import Best, Run, device_peak_flops, start_run
from rlhf.trainers.validation import Validator, share_out, write_training_samples
from rlhf.types import Experience, LossOutput, MicroBatch, Prompt, Rollout, Sampling, Scores


@dataclass
class Models:
    """Everything that sits on this rank's device. reference: a forward without gradients, None where no KL is asked for."""

    actor: TrainEngine
    critic: TrainEngine | None
    reference: Callable[..., Any] | None
    rewards: Rewards
    hybrid_engine: HybridEngine
    together: int = 1  # `scored_together`

    def fetch(self, progress: Progress | None = None, reference: bool = True) -> None:
        """What is to be scored next sets out for the device, where `offload` keeps its weights on the host; not what the step has scored already, nor
        a reference that it does not ask."""
        scored = [name for name in ("reward models", "ref") if progress and progress.kept(name) is not None] + ["ref"] * (not reference)
        for model in frozen_engines(self.rewards if "reward models" not in scored else None, self.reference if "ref" not in scored else None):
            model.fetch()

    @property
    def engines(self) -> dict[str, TrainEngine]:
        return {"actor": self.actor} | ({"critic": self.critic} if self.critic else {})


def frozen_engines(rewards: Rewards | None, reference: Any) -> list[FrozenEngine]:
    scorers = [scorer.forward for scorer in rewards.scorers if isinstance(scorer, RewardModel)] if rewards else []
    return [model for model in (*scorers, reference) if isinstance(model, FrozenEngine)]


def train_rl(config: Config, world: World, resume: str, cleanup: ExitStack) -> None:
    """Run the recipe."""
    assert config.actor.path is not None and config.train.steps is not None
    algorithm, steps = config.algorithm, config.train.steps
    tokenizer = load_tokenizer(config.actor.path, config.actor.trust_remote_code)
    prompts, report = load_prompts(config.data.train, config.data, tokenizer)
    held_out, held_out_report = load_prompts(config.validation.data, config.data, tokenizer) if config.validation.data else ([], None)
    verifier = FunctionReward(RewardComponentConfig(function=config.validation.verifier)) if held_out else None
    for component in config.reward.components:
        if component.function:
            FunctionReward(component).check_columns({name for p in prompts for name in p.columns})
    if verifier:
        verifier.check_columns({name for p in held_out for name in p.columns})

    best = Best(config.validation.best_metric or _accuracy_metric(held_out), config.validation.best_mode or "max", config.checkpoint.keep_best)
    prompts, overlap = separate(prompts, held_out, config.data.drop_held_out)
    rows = [[p.input_ids for p in part] for part in (prompts, held_out)]
    run = start_run(config, world, tokenizer, resume, steps, best, cleanup, *rows)
    config = run.config  # with the budget of earlier starts
    for text in [report.summary(), *([held_out_report.summary()] if held_out_report else []), *overlap]:
        run.console.message(text)
    longest = check_lengths(config, prompts, held_out)
    run.expect(longest)  # (collective)
    config = run.config  # with what was left to the memory plan
    named = [component.function for component in config.reward.components if component.function] + ([verifier.path] if verifier else [])
    pool = cleanup.enter_context(Pool(named, config.reward.workers, config.reward.timeout))  # imports while models load
    models = build_models(run, longest, pool)
    sampler = DrawSampler(len(prompts), config.seed, config.data.shuffle)
    kl_controller = KLController(algorithm.kl.coef, algorithm.kl.controller == "adaptive", algorithm.kl.target, algorithm.kl.horizon)
    validate = None
    if verifier:
        validate = Validator(
            config, held_out, verifier, models.rewards, models.hybrid_engine, tokenizer, world, run.samples_dir, run.disk_may_fail, run.timer.part
        )
    timer, accounting = run.timer, Accounting(run, models)

    start = run.resume(models.engines, steps)
    if run.state:
        sampler.load_state_dict(run.state["sampler"])
        kl_controller.load_state_dict(run.state["kl_controller"])
    run.compare(models.engines, lambda: {"sampler": sampler.state_dict(), "kl_coef": kl_controller.coef})

    if start < steps and run.on_gpu:
        fit_budget(run, probes(models))  # (collective)
        config = run.config
    layout = weight_layout(models.actor.module)
    release, lend = releases(config), lends_weights(config, world.size, run.on_gpu)

    def hand_over() -> None:  # (collective)
        models.actor.hand_over(layout, models.hybrid_engine, lend)

    if start < steps:
        hand_over()  # (collective)
    if not run.state and validate and config.validation.before_training:
        timer.start_step()
        with timer.phase("testing"):
            before = validate(0)  # (collective)
        best.check(before)
        run.log_step(0, before | timer.metrics())

    def step_once(step: int) -> None:  # (collective)
        timer.start_step(step)
        progress = run.progress(step, models.engines, state())
        draws = sampler.next(config.rollout.prompts)
        of_draw = {d.draw: prompts[d.row] for d in draws}
        early = models.rewards.early()  # functions score what has ended while the rest is decoded

        def generated() -> dict[str, Tensor]:  # (collective)
            with timer.phase("gen"):
                local = share_out(models.hybrid_engine, list(of_draw.values()), list(of_draw), sampling(config), config, world, early)
                early.close()
                world.wait_for_all("rollout")
                if release:
                    models.hybrid_engine.release()
                return gather_rollout(local, of_draw, world).tensors()  # (collective)

        def judged() -> dict[str, Tensor]:  # (collective)
            with timer.phase("reward"):
                return models.rewards.score_with_models(rollout)

        def scored() -> Scores:  # (collective)
            with timer.phase("reward"):
                return models.rewards.score(rollout, early, by_models)  # (collective)

        made_before = progress.kept("rollout") is not None
        rollout = Rollout.of(progress.once("rollout", generated), of_draw)
        if made_before:
            early.take(rollout, range(world.rank, len(rollout), world.size) if progress.kept("scores") is None else ())
        with timer.phase("reward"):
            models.fetch(progress, needs_reference(config, step))
        by_models = progress.once("reward models", judged) if models.rewards.has_models else {}
        experience, update = learn(models, config, timer, rollout, scored, step, kl_controller.coef, world, progress)
        metrics = describe_experience(experience, kl_controller.coef) | update.metrics()  # (collective)
        good = run.judge(step, update.problem, metrics, models.engines, lambda folder: save_batch(folder, experience, tokenizer))
        if good and "actor/kl_per_response" in metrics and bool(experience.mask.any()):
            kl_controller.update(metrics["actor/kl_per_response"], len(rollout))

        with timer.phase("hand_over"):
            hand_over()
        measured: dict[str, float] = {}
        if validate and (step % config.validation.every == 0 or step == steps):

            def tested() -> dict[str, Tensor]:  # (collective)
                with timer.phase("testing"):
                    return {name: torch.tensor(value, dtype=torch.float64) for name, value in validate(step).items()}

            measured = {name: float(value) for name, value in progress.once("validation", tested).items()}
        metrics |= measured
        if world.is_main:
            with run.disk_may_fail():
                write_training_samples(run.samples_dir / f"training-{step:06d}.jsonl", experience, tokenizer, config.validation.samples)
        new_best = good and bool(measured) and best.offer(step, measured)
        save = new_best or (good and run.is_due(step, steps))
        timing = partial(accounting, step, rollout, actor_updates=len(update.steps["actor"]))
        run.end_step(step, metrics, models.engines, state(), "actor", save, timing=timing)
        run.end_if_unscored(step, bool(experience.scores.valid.any()))  # (collective)

    def state() -> dict[str, Any]:
        return {"sampler": sampler.state_dict(), "kl_controller": kl_controller.state_dict()}

    for step in range(start + 1, steps + 1):
        step_once(step)
    run.finish()


# --------------------------------------------------------------------------------------------------------------------------
# Models


def build_models(run: Run, max_context: int, pool: Pool) -> Models:
    """Load all roles, each under its own DeepSpeed settings. (collective)"""
    config, world = run.config, run.world
    assert config.train.steps is not None and config.actor.path is not None
    updates = config.algorithm.epochs * config.algorithm.minibatches
    actor = run.train_engine(config.actor, "actor", (config.train.steps - config.algorithm.critic_warmup_steps) * updates)
    critic = None
    if config.algorithm.needs_critic:
        role = config.critic.model_copy(update={"path": critic_origin(config)})
        base = frozen_base(actor.module) if role.share_base else None
        critic = run.train_engine(role, "critic", config.train.steps * updates, scalar_head=config.critic.head, base=base)
    scorers = [_scorer(run, component, actor) for component in config.reward.components]
    ends = eos_token_ids(config.actor.path, run.tokenizer, config.rollout.eos_token_ids)
    assert isinstance(run.tokenizer.pad_token_id, int)
    reference = _reference(run, actor) if config.uses_reference else None
    rewards = Rewards(config.reward, scorers, run.tokenizer, world, pool)
    trained, frozen = [model for model in (actor, critic) if model], frozen_engines(rewards, reference)
    return Models(
        actor=actor,
        critic=critic,
        reference=reference,
        rewards=rewards,
        hybrid_engine=HybridEngine(
            without_dropout(read_architecture(config.actor, "actor")),
            ends,
            run.tokenizer.pad_token_id,
            engine_settings(config, max_context),
            world.device,
            model_dtype(config.actor, world.device),
            world.beat,
            trust_remote_code=config.actor.trust_remote_code,
            to_come=lambda: memory_to_come(trained, frozen),
            most_cache=lambda: run.plan.cache,
        ),
        together=scored_together(
            config, all(is_lean(read_architecture(role, name)) for name, role in roles(config) if name in ("actor", "reference")), run.on_gpu
        ),
    )


def memory_to_come(trained: Iterable[TrainEngine], frozen: Iterable[FrozenEngine]) -> int:
    """Bytes of this rank's device that are free during a rollout and will not stay so: what an optimizer makes in its first step, and weights that
    are on the host just now."""
    return sum(model.states_to_come() for model in trained) + sum(model.visiting for model in frozen)


def engine_settings(config: Config, max_context: int) -> EngineSettings:
    r = config.rollout
    return EngineSettings(
        max_batch=r.decoded,
        max_context=max_context,
        cache_tokens=r.cache_tokens,
        memory_fraction=r.memory_fraction,
        prefill_tokens=r.prefill_tokens,
        deterministic=bool(config.deterministic),
    )


def _reference(run: Run, actor: TrainEngine) -> Callable[..., Any]:
    """The actor with its adapters off under LoRA (trap 14), unless another folder is named; else a frozen model of its own."""
    config = run.config
    if config.actor.lora and config.reference.path is None:

        def base(**inputs: Any) -> Any:
            with adapters_off(actor.module):
                return actor.score(**inputs)

        return base
    role = config.reference.model_copy(update={"path": config.reference.path or config.actor.path})
    settings = run.settings(role)
    dtype = model_dtype(role, run.world.device)
    module = load_causal_lm(role, "reference", loading_context(settings, run.world), run.world, dtype, config.train.packing)
    fuse_head(module)
    if role.compile:
        compile_layers(module)
    return FrozenEngine(module, settings, run.world, role.offloaded)


def _scorer(run: Run, component: RewardComponentConfig, actor: TrainEngine) -> FunctionReward | RewardModel:
    if component.model is None:
        return FunctionReward(component)
    role, key = component.model, f"reward model {component.label}"
    assert role.path is not None
    settings = run.settings(role)
    packing, dtype = run.config.train.packing, model_dtype(role, run.world.device)
    module: nn.Module
    if role.share_base:
        placement = loading_context(settings, run.world, frozen_base(actor.module))
        body = role.model_copy(update={"path": run.config.actor.path})
        module = load_adapter(load_scalar_model(body, key, placement, run.world, dtype, "zero", packing), role.path)
    else:
        module = load_scalar_model(role, key, loading_context(settings, run.world), run.world, dtype, "keep", packing)
    if role.compile:
        compile_layers(module)
    mean, std = score_statistics(role.path)
    engine = FrozenEngine(module, settings, run.world, role.offloaded)
    return RewardModel(engine, mean, std, lambda: run.config.train, run.world, engine.release)  # whose budget may become smaller


def separate(prompts: list[Prompt], held_out: list[Prompt], drop: bool) -> tuple[list[Prompt], list[str]]:
    """(training prompts, what to say of those that are held out too). Raises ValueError if dropping them leaves none."""
    known = {tuple(p.input_ids) for p in held_out}
    apart = [p for p in prompts if tuple(p.input_ids) not in known]
    shared = len(prompts) - len(apart)
    if not shared:
        return prompts, []
    if not drop:
        return prompts, [f"{shared} of {len(prompts)} training prompts are held out too (data.drop_held_out=true leaves them out)"]
    if not apart:
        raise ValueError("data.drop_held_out: every training prompt is held out too; give validation other data")
    return apart, [f"{shared} of {len(prompts)} training prompts are held out too: dropped"]


def check_lengths(config: Config, prompts: list[Prompt], held_out: list[Prompt]) -> int:
    """The most tokens of any prompt with its response. ValueError if they would not fit the actor's positions, the KV cache that the recipe gives, or
    what a DeepSpeed JSON allows."""
    most, allowed = 0, hybrid_engine_words(config)["max_context"]
    positions = getattr(read_architecture(config.actor, "actor").get_text_config(), "max_position_embeddings", None)
    window = config.rollout.max_new_tokens
    for name, rows, new in (("training", prompts, window), ("validation", held_out, config.validation.max_new_tokens or window)):
        longest = max((len(p.input_ids) for p in rows), default=0)
        if positions and rows and longest + new > positions:
            raise ValueError(
                f"the longest {name} prompt has {longest} tokens; with {new} new ones that is more than the model's {positions} positions "
                "(max_position_embeddings): lower data.max_prompt_tokens or max_new_tokens"
            )
        if allowed and longest + new > allowed:
            raise ValueError(
                f"the longest {name} prompt has {longest} tokens; with {new} new ones that is more than "
                f"hybrid_engine.max_out_tokens={allowed} of the DeepSpeed JSON: raise it, or lower data.max_prompt_tokens or max_new_tokens"
            )
        most = max(most, longest + new if rows else 0)
    check_cache(EngineSettings(cache_tokens=config.rollout.cache_tokens), most)  # the plan is still to say how many are decoded together
    return most


def _accuracy_metric(prompts: list[Prompt]) -> str:
    sources = {p.source for p in prompts}
    return f"val-core/{sources.pop() if len(sources) == 1 else 'all'}/acc/mean@1"


# --------------------------------------------------------------------------------------------------------------------------
# Experience


def sampling(config: Config) -> Sampling:
    return Sampling(config.rollout.max_new_tokens, config.rollout.temperature, seed=config.seed)


def passes(models: Models, config: Config, timer: PhaseTimer, old_logprobs: bool = True, ref_logprobs: bool = True) -> ExperiencePasses:
    """The scoring forwards."""
    temperature = config.rollout.temperature
    reference, critic = models.reference if ref_logprobs else None, models.critic
    return ExperiencePasses(
        old_logprobs=(lambda batch: response_logprobs(models.actor.score, batch, temperature)[0]) if old_logprobs else None,
        ref_logprobs=(lambda batch: response_logprobs(reference, batch, temperature)[0]) if reference else None,
        values=(lambda batch: response_values(critic.score, batch)) if critic else None,
        packing=config.train.packing,
        timed=timer.phase,
        together=models.together,
    )


def describe_experience(experience: Experience, kl_coef: float) -> dict[str, float]:
    """Metrics of a rollout batch, computed from all rows on every rank."""
    e, mask = experience, experience.mask
    valid = e.scores.valid
    lengths = e.rollout.response_lengths.float()
    metrics = {
        "critic/score/mean": _mean(e.scores.total[valid]),
        "critic/score/std": float(e.scores.total[valid].std()) if int(valid.sum()) > 1 else 0.0,
        "critic/rewards/mean": _mean(e.rewards.sum(1)[valid]),
        "critic/advantages/mean": float(masked_mean(e.advantages, mask)),
        "reward/invalid": float((~valid).sum()),
        "response_length/mean": float(lengths.mean()),
        "response_length/max": float(lengths.max()),
        "response_length/clip_ratio": float((~e.rollout.finished).float().mean()),
        "prompt_length/mean": float(e.rollout.prompt_lengths.float().mean()),
    }
    if e.old_logprobs is not None:
        # How far the sampler's logprobs are from the training forward's: they are a behaviour policy, never the old policy (trap 9).
        distance = (e.old_logprobs - e.rollout.rollout_logprobs)[mask].abs()
        metrics |= {"rollout/logprob_diff_mean": _mean(distance), "rollout/logprob_diff_max": float(distance.max()) if len(distance) else 0.0}
    for name, values in e.scores.components.items():
        metrics[f"reward/{name}/mean"] = _mean(values[values.isfinite()])
    for name, count in e.scores.failures.items():
        metrics[f"reward_failures/{name}"] = float(count)
    if e.old_logprobs is not None and e.ref_logprobs is not None:
        metrics["actor/kl"] = float(masked_mean(e.old_logprobs - e.ref_logprobs, mask))
        metrics["actor/kl_per_response"] = kl_per_response(e)
        metrics["actor/kl_coef"] = kl_coef
    if e.values is not None and e.returns is not None:
        metrics["critic/vf_explained_var"] = explained_variance(e.values[:, :-1], e.returns, mask)
        metrics["critic/values/mean"] = float(masked_mean(e.values[:, :-1], mask))
        metrics["critic/returns/mean"] = float(masked_mean(e.returns, mask))
    return metrics


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0


# --------------------------------------------------------------------------------------------------------------------------
# Update


def learn(
    models: Models,
    config: Config,
    timer: PhaseTimer,
    rollout: Rollout,
    scored: Callable[[], Scores],
    step: int,
    kl_coef: float,
    world: World,
    progress: Progress | None = None,
) -> tuple[Experience, UpdateMetrics]:
    """What follows a rollout: the scoring forwards, advantages, and every optimizer step of actor and critic; `scored` waits for the scores.
    (collective)"""
    progress = progress or Progress()
    first_epoch = [micro_batch for minibatch in plan_epoch(config, step, 0, rollout, world) for micro_batch in minibatch.plan]
    scorers = passes(models, config, timer, needs_old_logprobs(config, step), needs_reference(config, step))
    experience = make_experience(rollout, scored, scorers, first_epoch, config.algorithm, kl_coef, world, progress)
    if isinstance(models.reference, FrozenEngine):
        models.reference.release()
    if problem := unusable(experience):
        return experience, UpdateMetrics(world, problem)
    return experience, update_models(models, config, timer, experience, step, kl_coef, world, progress)


def update_models(
    models: Models,
    config: Config,
    timer: PhaseTimer,
    experience: Experience,
    step: int,
    kl_coef: float,
    world: World,
    progress: Progress | None = None,
) -> UpdateMetrics:
    """Every optimizer step on an experience, which has old logprobs afterwards if it had none, and the actor has learnt. (collective)"""
    algorithm, rollout = config.algorithm, experience.rollout
    update, progress = UpdateMetrics(world), progress or Progress()
    progress.accumulate(update)
    if experience.old_logprobs is None and (kept := progress.kept("old_log_prob")):
        experience.old_logprobs = kept["all"]
    for minibatch in (m for epoch in range(algorithm.epochs) for m in plan_epoch(config, step, epoch, rollout, world)):
        counts = denominators(experience, minibatch.rows, config)
        if counts["tokens"] == 0:  # the same on every rank: nothing to learn here, and no stale gradient either (trap 22)
            if progress.take_turn():
                update.skipped += 1
                progress.end_turn()
            continue
        if step > algorithm.critic_warmup_steps and progress.take_turn():
            seen: list[tuple[MicroBatchPlan, Tensor]] = []  # logprobs of the update's own forwards
            with timer.phase("update_actor"):
                ahead = Ahead(experience, minibatch.plan, config, world)
                for part in minibatch.plan:
                    loss = policy_loss(models.actor, ahead.take(), config, kl_coef)
                    ahead.prepare()
                    models.actor.backward(loss.loss_sum, counts[algorithm.loss_mean])  # (collective)
                    update.add(loss, counts["tokens"])
                    if experience.old_logprobs is None and loss.logprobs is not None:
                        seen.append((part, loss.logprobs))
                update.stepped("actor", models.actor.step())  # (collective)
            if experience.old_logprobs is None:
                experience.old_logprobs = gather_results(seen, len(rollout), experience.mask.shape[1], world)  # (collective)
                progress.keep("old_log_prob", {"all": experience.old_logprobs})
            progress.end_turn()
        if models.critic is not None and progress.take_turn():
            with timer.phase("update_critic"):
                ahead = Ahead(experience, minibatch.plan, config, world)
                for _ in minibatch.plan:
                    loss = critic_loss(models.critic, ahead.take(), algorithm)
                    ahead.prepare()
                    models.critic.backward(loss.loss_sum, counts["tokens"])  # (collective)
                    update.add(loss, counts["tokens"])
                update.stepped("critic", models.critic.step())  # (collective)
            progress.end_turn()
    return update


@dataclass(frozen=True)
class Minibatch:
    rows: list[int]  # over all ranks
    plan: list[MicroBatchPlan]  # this rank's


def plan_epoch(config: Config, step: int, epoch: int, rollout: Rollout, world: World) -> list[Minibatch]:
    """The minibatches of one pass over the rollout batch; which rows meet does not depend on the number of ranks. No forward has rows that cannot
    train; a minibatch of such rows alone has none."""
    lengths = (rollout.prompt_lengths + rollout.response_lengths).tolist()
    train, trains = config.train, may_train(rollout, config.algorithm).tolist()

    def forwards(rows: list[int]) -> list[MicroBatchPlan]:
        kept = [row for row in rows if trains[row]]
        return plan_micro_batches(kept, lengths, train.micro_batch, world.size, world.rank, train.forward_tokens) if kept else []

    parts = split_minibatches(len(lengths), config.algorithm.minibatches, seed=(config.seed, step, epoch))
    return [Minibatch(rows, forwards(rows)) for rows in parts]


class Ahead:
    """The micro-batches of a plan, each made while the device still computes the one before: ZeRO-3 ends a backward pass by waiting for it."""

    def __init__(self, experience: Experience, plan: Sequence[MicroBatchPlan], config: Config, world: World) -> None:
        self._batches = (micro_batch_of(experience, part, config.train.packing).to(world.device) for part in plan)
        self.prepare()

    def prepare(self) -> None:
        """The next one, while there is one."""
        self._next = next(self._batches, None)

    def take(self) -> MicroBatch:
        batch, self._next = self._next, None
        assert batch is not None
        return batch


def denominators(experience: Experience, rows: list[int], config: Config) -> dict[str, float]:
    """What a loss may be a mean over, counted over the whole optimizer step on all ranks (trap 5)."""
    mask = experience.mask[rows]
    trained = int(mask.any(1).sum())
    return {"tokens": int(mask.sum()), "sequences": trained, "constant": trained * config.rollout.max_new_tokens}


def micro_batch_of(experience: Experience, part: MicroBatchPlan, packing: bool = False) -> MicroBatch:
    e, r = experience, experience.rollout
    columns = {"advantages": e.advantages}
    if e.old_logprobs is not None:
        columns["old_logprobs"] = e.old_logprobs
    if e.ref_logprobs is not None:
        columns["ref_logprobs"] = e.ref_logprobs
    if e.values is not None and e.returns is not None:
        columns |= {"values": e.values, "returns": e.returns}
    return collate(r.input_ids, r.prompt_lengths, r.response_lengths, e.mask, part, columns, packing)


def save_batch(folder: Path, experience: Experience, tokenizer: PreTrainedTokenizerBase) -> None:
    """Everything of a batch, for a look at what went wrong: tensors, and texts with their scores."""
    write_tensors(folder / "experience.safetensors", tensors_of(experience), {})
    write_training_samples(folder / "samples.jsonl", experience, tokenizer, len(experience.rollout))


def policy_loss(forward: Callable[..., Any], batch: MicroBatch, config: Config, kl_coef: float) -> LossOutput:
    """Policy loss + KL term - entropy bonus, summed over this micro-batch."""
    algorithm, mask, columns = config.algorithm, batch.mask, batch.columns
    logprobs, entropy = response_logprobs(forward, batch, config.rollout.temperature, entropy_gradient=algorithm.entropy_coef > 0)
    old = columns.get("old_logprobs", logprobs.detach())
    loss = POLICY_LOSSES[algorithm.policy_loss]
    per_token, metrics = loss(logprobs, old, columns["advantages"], mask, clip_eps_low=algorithm.clip_eps_low, clip_eps_high=algorithm.clip_eps_high)
    metrics["actor/pg_loss"] = per_token.detach().sum()
    metrics["actor/entropy"] = masked_sum(entropy.detach(), mask)
    if algorithm.entropy_coef:
        per_token = per_token - algorithm.entropy_coef * torch.where(mask, entropy, torch.zeros_like(entropy))
    if algorithm.kl.place == "loss" and algorithm.kl.coef:
        # Masked before the exponential: beyond a response it may overflow, and 0 * inf in the backward pass would be NaN everywhere.
        kept = [torch.where(mask, x, torch.zeros_like(x)) for x in (logprobs, old, columns["ref_logprobs"])]
        kl = kl_loss(algorithm.kl.estimator, *kept)
        metrics["actor/kl_loss"] = kl.detach().sum()
        per_token = per_token + kl_coef * kl
    weight = 1 / mask.sum(1, keepdim=True).clamp(min=1) if algorithm.loss_mean == "sequences" else torch.ones_like(per_token[:, :1])
    return LossOutput((per_token * weight).sum(), metrics, logprobs.detach())


def critic_loss(forward: Callable[..., Any], batch: MicroBatch, algorithm: AlgorithmConfig) -> LossOutput:
    values = response_values(forward, batch)[:, :-1]
    loss, metrics = value_loss(values, batch.columns["values"], batch.columns["returns"], batch.mask, algorithm.value_clip)
    return LossOutput(loss, metrics)


def probes(models: Models) -> dict[str, Loss]:
    """The update's losses on rows of given lengths, everything after the first token being a response that scores nothing."""

    def batch(lengths: list[int], config: Config, device: torch.device) -> MicroBatch:
        ids, n = torch.zeros(len(lengths), max(lengths), dtype=torch.int64), torch.tensor(lengths)
        names = ["advantages", "old_logprobs", "values", "returns"] + ["ref_logprobs"] * config.uses_reference
        none = torch.zeros(len(lengths), max(lengths))
        plan = MicroBatchPlan(list(range(len(lengths))), weightless=True)
        return collate(ids, torch.ones_like(n), n - 1, none.bool(), plan, dict.fromkeys(names, none), config.train.packing).to(device)

    def actor(module: nn.Module, lengths: list[int], config: Config) -> Tensor:
        return policy_loss(module, batch(lengths, config, models.actor.world.device), config, config.algorithm.kl.coef).loss_sum

    def critic(module: nn.Module, lengths: list[int], config: Config) -> Tensor:
        return critic_loss(module, batch(lengths, config, models.actor.world.device), config.algorithm).loss_sum

    return {"actor": actor} | ({"critic": critic} if models.critic else {})


class UpdateMetrics:
    """Sums over micro-batches and ranks, divided once by the tokens of each optimizer step (trap 30), then averaged over the steps."""

    def __init__(self, world: World, problem: str | None = None) -> None:
        self.world = world
        self.problem = problem  # why the update, or a part of it, has not been made
        self.sums: dict[str, Tensor] = {}  # on the device: reading them would wait for it in every micro-batch
        self.steps: dict[str, list[StepResult]] = defaultdict(list)
        self.skipped = 0

    def add(self, loss: LossOutput, tokens: float) -> None:
        for name, value in loss.metrics.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value / tokens

    def stepped(self, model: str, result: StepResult) -> None:
        self.steps[model].append(result)
        if not result.applied:
            self.problem = f"the {model}'s gradient is not finite"

    def state_dict(self) -> dict[str, float]:
        """For `Progress`."""
        state = {f"sum/{name}": float(value) for name, value in self.sums.items()} | {"skipped": float(self.skipped)}
        for model, results in self.steps.items():
            for i, r in enumerate(results):
                state |= {f"{model}/{i}/grad_norm": r.grad_norm, f"{model}/{i}/learning_rate": r.learning_rate}
        return state

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.skipped = int(state["skipped"])
        for name, value in state.items():
            if name.startswith("sum/"):
                self.sums[name.removeprefix("sum/")] = torch.tensor(value, dtype=torch.float32, device=self.world.device)
        for model in ("actor", "critic"):
            while (norm := state.get(f"{model}/{len(self.steps[model])}/grad_norm")) is not None:
                self.stepped(model, StepResult(norm, state[f"{model}/{len(self.steps[model])}/learning_rate"], math.isfinite(norm)))
            if not self.steps[model]:
                del self.steps[model]

    def metrics(self) -> dict[str, float]:
        """(collective)"""
        sums = {name: float(value) for name, value in self.sums.items()}
        metrics = {name: value / len(self.steps[name.split("/")[0]]) for name, value in self.world.global_sum(sums).items()}
        for model, results in self.steps.items():
            metrics[f"{model}/grad_norm"] = float(np.mean([r.grad_norm for r in results]))
            metrics[f"{model}/lr"] = results[-1].learning_rate
        return metrics | {"train/skipped_updates": float(self.skipped)}


# --------------------------------------------------------------------------------------------------------------------------
# Accounting


class Accounting:
    """Seconds, tokens and model operations per phase of this rank's share of a step."""

    def __init__(self, run: Run, models: Models) -> None:
        self.timer, self.meter, self.world, self.config, self.models = run.timer, run.meter, run.world, run.config, models
        self.peak = device_peak_flops()
        self.shape = model_shape(models.hybrid_engine.config)
        self.scalar = model_shape(models.hybrid_engine.config, head_outputs=1)

    def __call__(self, step: int, rollout: Rollout, actor_updates: int) -> dict[str, float]:
        p, n = rollout.prompt_lengths.numpy(), rollout.response_lengths.numpy()
        tokens, responses, ranks = int((p + n).sum()), int(n.sum()), self.world.size
        step_tokens, epochs = tokens // ranks, self.config.algorithm.epochs
        self.timer.add("gen", responses // ranks, rollout_flops(self.shape, rollout.draw.numpy(), p, n) / ranks)
        kept = may_train(rollout, self.config.algorithm).numpy()
        p, n = p[kept], n[kept]
        tokens, responses = int((p + n).sum()), int(n.sum())
        if needs_old_logprobs(self.config, step):
            self.timer.add("old_log_prob", tokens // ranks, forward_flops(self.shape, p + n, responses) / ranks)
        if needs_reference(self.config, step):
            self.timer.add("ref", tokens // ranks, forward_flops(self.shape, p + n, responses) / ranks)
        lora = self.config.actor.lora is not None
        if actor_updates:
            self.timer.add("update_actor", epochs * tokens // ranks, epochs * update_flops(self.shape, p + n, responses, lora) / ranks)
        if self.models.critic:
            self.timer.add("values", tokens // ranks, forward_flops(self.scalar, p + n, tokens) / ranks)
            lora = self.config.critic.lora is not None
            self.timer.add("update_critic", epochs * tokens // ranks, epochs * update_flops(self.scalar, p + n, tokens, lora) / ranks)
        return self.timer.metrics(self.peak, step_tokens=step_tokens, actor_memory_mb=self.meter.most_allocated_mb())
