"""Held-out accuracy, and samples for people to read."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlhf.config import Config
from rlhf.distributed import World
from rlhf.experience import gather_rollout
from rlhf.metrics import bootstrap_interval, write_samples
from rlhf.rewards.compose import EarlyScorer, Rewards, collect
from rlhf.rewards.functions import FunctionReward
from rlhf.rollout import HybridEngine
from rlhf.types import Experience, Prompt, Rollout, Sampling, Scores

VALIDATION_STREAM = 1
VERIFIER = "validation.verifier"  # among the functions that score


@dataclass
class Validator:
    """pass@1 per data source by the recipe's verifier, and what the training rewards say of the same responses."""

    config: Config
    prompts: list[Prompt]
    verifier: FunctionReward
    rewards: Rewards
    hybrid_engine: HybridEngine
    tokenizer: PreTrainedTokenizerBase
    world: World
    samples_dir: Path
    disk_may_fail: Callable[[], AbstractContextManager[None]] = nullcontext
    part: Callable[[str], AbstractContextManager[None]] = nullcontext

    def __call__(self, step: int) -> dict[str, float]:
        """Metrics of the current weights; the engine must hold them. A sample that the verifier cannot judge counts as wrong. (collective)"""
        v = self.config.validation
        sampling = Sampling(
            v.max_new_tokens or self.config.rollout.max_new_tokens, v.temperature, v.top_k, v.top_p, seed=self.config.seed, stream=VALIDATION_STREAM
        )
        early = self.rewards.early({VERIFIER: self.verifier})
        local = share_out(self.hybrid_engine, self.prompts, list(range(len(self.prompts))), sampling, self.config, self.world, early, group_size=1)
        early.close()
        self.world.wait_for_all("validation")
        rollout = gather_rollout(local, dict(enumerate(self.prompts)), self.world)
        with self.part("reward"):  # whose memory depends on other keys than the rollout's
            judged = self.rewards.score_with_models(rollout)
        scores = self.rewards.score(rollout, early, judged)
        verdict, failures = collect(VERIFIER, early, rollout, self.world)
        correct = torch.where(verdict.isfinite(), (verdict >= 1.0).float(), torch.nan)  # what could not be judged is neither right nor wrong
        metrics: dict[str, float] = {"val-aux/verifier/failed": float(sum(failures.values()))}
        sources = np.array([p.source for p in rollout.prompts])
        for source in sorted(set(sources)):
            _interval(metrics, f"val-core/{source}/acc", correct[torch.from_numpy(sources == source)])
        if len(set(sources)) > 1:
            _interval(metrics, "val-core/all/acc", correct)
        for name, values in scores.components.items():
            known = values[values.isfinite()]
            if len(known):
                metrics[f"val-aux/reward/{name}"] = float(known.mean())
        metrics["val-aux/response_length/mean"] = float(rollout.response_lengths.float().mean())
        metrics["val-aux/response_length/clip_ratio"] = float((~rollout.finished).float().mean())
        if self.world.is_main:
            shown = range(min(v.samples, len(rollout)))
            told = [None if math.isnan(c) else bool(c) for c in correct.tolist()]
            rows = (sample_row(rollout, scores, self.tokenizer, i) | {"correct": told[i]} for i in shown)
            with self.disk_may_fail():
                write_samples(self.samples_dir / f"validation-{step:06d}.jsonl", rows)
                np.save(self.samples_dir / f"validation-{step:06d}-correct.npy", correct.numpy())
        return metrics


def share_out(
    engine: HybridEngine,
    prompts: list[Prompt],
    draws: list[int],
    sampling: Sampling,
    config: Config,
    world: World,
    early: EarlyScorer,
    group_size: int = 0,
) -> Rollout:
    """This rank's part of the responses to all prompts; the same tokens however they are shared out (trap 25). No collective. early: hears of each.

    By plan every rank takes each size-th prompt. By queue a rank pulls the next prompt when it has room (`World.fair_queue`).
    """
    group = group_size or config.rollout.group_size
    deterministic = config.deterministic if config.deterministic is not None else world.device.type == "cpu"
    balance = config.rollout.balance if config.rollout.balance != "auto" else ("plan" if deterministic else "queue")
    planned = world.size == 1 or balance == "plan"
    if planned:
        prompts, draws = prompts[world.rank :: world.size], draws[world.rank :: world.size]

    def ended(row: int, ids: list[int]) -> None:
        early.submit(prompts[row // group], draws[row // group], row % group, ids)

    if planned:
        return engine.generate(prompts, draws, group, sampling, on_finished=ended)
    return engine.generate(prompts, draws, group, sampling, **world.fair_queue(len(prompts), group), on_finished=ended)


def _interval(metrics: dict[str, float], name: str, correct: torch.Tensor) -> None:
    """correct: 1, 0, or NaN for what the verifier has failed on, which does not count."""
    known = correct[correct.isfinite()]
    mean, low, high = bootstrap_interval(known.numpy(), seed=0) if len(known) else (math.nan, math.nan, math.nan)
    metrics.update({f"{name}/mean@1": mean, f"{name}/low": low, f"{name}/high": high, f"{name}/n": float(len(known))})


def sample_row(rollout: Rollout, scores: Scores, tokenizer: PreTrainedTokenizerBase, row: int) -> dict[str, Any]:
    """One response as a person wants to read it."""
    columns = rollout.prompts[row].columns
    return {
        "source": rollout.prompts[row].source,
        "prompt": rollout.prompts[row].text,
        "completion": tokenizer.decode(rollout.response_ids(row), skip_special_tokens=True),
        **({"answer": columns["answer"]} if "answer" in columns else {}),
        "reward": float(scores.total[row]),
        "components": {name: _plain(float(values[row])) for name, values in scores.components.items()},
        "length": int(rollout.response_lengths[row]),
        "stop_reason": "eos" if rollout.finished[row] else "length",
    }


def _plain(value: float) -> float | None:
    return value if np.isfinite(value) else None


def write_training_samples(path: Path, experience: Experience, tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    """The first rows of a step's experience with their mean advantage."""
    e = experience
    means = (e.advantages * e.mask).sum(1) / e.mask.sum(1).clamp(min=1)
    rows = range(min(count, len(e.rollout)))
    write_samples(
        path, (sample_row(e.rollout, e.scores, tokenizer, r) | {"advantage": float(means[r]), "draw": int(e.rollout.draw[r])} for r in rows)
    )
