"""One PPO or GRPO step through the real functions of rlhf/trainers/rl.py, on a rollout that is given instead of sampled."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf.config import Config
from rlhf.distributed import World
from rlhf.engine import TrainEngine
from rlhf.experience import make_experience
from rlhf.models.lora import weight_layout
from rlhf.trainers.rl import (
    Models,
    build_models,
    critic_loss,
    denominators,
    micro_batch_of,
    needs_old_logprobs,
    passes,
    plan_epoch,
    policy_loss,
)
from rlhf.trainers.run import Best, Run, start_run
from rlhf.types import Experience, Rollout, Scores
from tests.helpers import tiny_tokenizer


def open_models(config: Config, world: World) -> tuple[Models, Run]:
    folder = world.broadcast_object(tempfile.mkdtemp())
    run = start_run(config.model_copy(update={"run_dir": Path(folder)}), world, tiny_tokenizer(), "never", 1, Best("", "max"), ExitStack())
    return build_models(run), run


def weights(engine: TrainEngine) -> dict[str, Tensor]:
    return {name: tensor.detach().float().clone() for name, tensor in engine.full_tensors(weight_layout(engine.module))}


def experience_of(models: Models, run: Run, rollout: Rollout, scores: Scores, step: int = 1, old_logprobs: bool | None = None) -> Experience:
    """old_logprobs: with a pass for them or without; None = as the loop decides."""
    config, world = run.config, run.world
    lengths = (rollout.prompt_lengths + rollout.response_lengths).tolist()
    plan = [part for minibatch in plan_epoch(config, step, 0, lengths, world) for part in minibatch.plan]
    needed = needs_old_logprobs(config, step) if old_logprobs is None else old_logprobs
    return make_experience(rollout, scores, passes(models, config, run.timer, needed), plan, config.algorithm, config.algorithm.kl.coef, world)


def update(models: Models, run: Run, experience: Experience, step: int = 1, actor: bool = True) -> dict[str, list[Any]]:
    """As the loop of `train_rl` does it: StepResults of both models, and the logprobs of the actor's forwards."""
    config, world, algorithm = run.config, run.world, run.config.algorithm
    lengths = (experience.rollout.prompt_lengths + experience.rollout.response_lengths).tolist()
    results: dict[str, list[Any]] = {"actor": [], "critic": [], "logprobs": []}
    for minibatch in (m for epoch in range(algorithm.epochs) for m in plan_epoch(config, step, epoch, lengths, world)):
        counts = denominators(experience, minibatch.rows, config)
        if actor:
            for part in minibatch.plan:
                loss = policy_loss(models.actor, micro_batch_of(experience, part, config.train.packing), config, algorithm.kl.coef)
                models.actor.backward(loss.loss_sum, counts[algorithm.loss_mean])
                results["logprobs"].append((part, loss.logprobs))
            results["actor"].append(models.actor.step())
        if models.critic is not None:
            for part in minibatch.plan:
                loss = critic_loss(models.critic, micro_batch_of(experience, part, config.train.packing), algorithm)
                models.critic.backward(loss.loss_sum, counts["tokens"])
            results["critic"].append(models.critic.step())
    return results
