"""One PPO or GRPO step through the real functions of rlhf/trainers/rl.py, on a rollout that is given instead of sampled."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from rlhf.config import Config
from rlhf.distributed import World
from rlhf.engine import TrainEngine
from rlhf.experience import make_experience, needs_old_logprobs
from rlhf.models.lora import weight_layout
from rlhf.rewards.pool import Pool
from rlhf.trainers.rl import Models, UpdateMetrics, build_models, passes, plan_epoch, update_models
from rlhf.trainers.run import Best, Run, start_run
from rlhf.types import Experience, Rollout, Scores
from tests.helpers import tiny_tokenizer


def open_models(config: Config, world: World) -> tuple[Models, Run]:
    folder = world.broadcast_object(tempfile.mkdtemp())
    run = start_run(config.model_copy(update={"run_dir": Path(folder)}), world, tiny_tokenizer(), "never", 1, Best("", "max"), ExitStack())
    return build_models(run, 0, Pool([])), run


def weights(engine: TrainEngine) -> dict[str, Tensor]:
    return {name: tensor.detach().float().clone() for name, tensor in engine.full_tensors(weight_layout(engine.module))}


def experience_of(models: Models, run: Run, rollout: Rollout, scores: Scores, step: int = 1, old_logprobs: bool | None = None) -> Experience:
    """old_logprobs: with a pass for them or without; None = as the loop decides."""
    config, world = run.config, run.world
    plan = [part for minibatch in plan_epoch(config, step, 0, rollout, world) for part in minibatch.plan]
    needed = needs_old_logprobs(config, step) if old_logprobs is None else old_logprobs
    scorers = passes(models, config, run.timer, needed)
    return make_experience(rollout, lambda: scores, scorers, plan, config.algorithm, config.algorithm.kl.coef, world)


def update(models: Models, run: Run, experience: Experience, step: int = 1, actor: bool = True) -> UpdateMetrics:
    """The update of `train_rl` itself; actor: False = as in a step in which only the critic learns."""
    algorithm = run.config.algorithm.model_copy(update={} if actor else {"critic_warmup_steps": step})
    config = run.config.model_copy(update={"algorithm": algorithm})
    return update_models(models, config, run.timer, experience, step, algorithm.kl.coef, run.world)
