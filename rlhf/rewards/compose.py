"""The weighted sum of all rewards, with what failed counted and left out."""

from __future__ import annotations

import math
import queue
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.config import RewardConfig
from rlhf.distributed import World
from rlhf.rewards.functions import FunctionReward
from rlhf.rewards.model import RewardModel
from rlhf.types import Prompt, Rollout, Scores

Scorer = FunctionReward | RewardModel


def score_with_function(function: FunctionReward, rollout: Rollout, tokenizer: PreTrainedTokenizerBase, world: World) -> tuple[Tensor, Counter[str]]:
    """([B] float32 with NaN where a sample is lost, reason -> number lost), each rank scoring its share of the rows. (collective)"""
    rows = list(range(world.rank, len(rollout), world.size))
    values, failures = _call(function, [rollout.prompts[r] for r in rows], [rollout.response_ids(r) for r in rows], tokenizer)
    total = world.gather_indexed(rows, torch.tensor(values, dtype=torch.float32)[:, None], len(rollout)).squeeze(1)
    return total, sum(world.gather_objects(failures), Counter())


def collect_early(name: str, early: EarlyScorer, rollout: Rollout, world: World) -> tuple[Tensor, Counter[str]]:
    """As `score_with_function`, of what each rank has scored of its own responses already. (collective)"""
    place = {(int(d), int(s)): i for i, (d, s) in enumerate(zip(rollout.draw, rollout.sample, strict=True))}
    found = early.scores[name]
    values = torch.tensor(list(found.values()), dtype=torch.float32)
    total = world.gather_indexed([place[key] for key in found], values[:, None], len(rollout)).squeeze(1)
    return total, sum(world.gather_objects(early.failures[name]), Counter())


@dataclass(frozen=True)
class _Job:
    prompt: Prompt
    key: tuple[int, int]  # draw, sample
    ids: list[int]


class EarlyScorer:
    """Function rewards of responses that have ended, in `workers` threads, while the others are still decoded. One for each rollout."""

    def __init__(self, functions: dict[str, FunctionReward], tokenizer: PreTrainedTokenizerBase, workers: int = 1) -> None:
        self.functions, self.tokenizer = functions, tokenizer
        self.scores: dict[str, dict[tuple[int, int], float]] = {name: {} for name in functions}  # NaN where a sample is lost
        self.failures: dict[str, Counter[str]] = {name: Counter() for name in functions}
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._threads = [threading.Thread(target=self._work, name=f"scorer-{i}", daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, prompt: Prompt, draw: int, sample: int, ids: list[int]) -> None:
        self._jobs.put(_Job(prompt, (draw, sample), ids))

    def finish(self) -> None:
        """Wait for what is still being scored; raises what a thread died of."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            while (batch := self._take()) is not None:
                for name, function in self.functions.items():
                    values, failures = _call(function, [j.prompt for j in batch], [j.ids for j in batch], self.tokenizer)
                    with self._lock:
                        self.scores[name].update(zip((j.key for j in batch), values, strict=True))
                        self.failures[name] += failures
        except BaseException as error:  # handed to the caller of `finish`
            self._error = error

    def _take(self) -> list[_Job] | None:
        """The next job, with this worker's share of whatever else has ended meanwhile, for the same call. None: there will be no more."""
        first = self._jobs.get()
        if first is None:
            return None
        jobs = [first]
        for _ in range(self._jobs.qsize() // len(self._threads)):
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:  # another worker's sign to end
                self._jobs.put(None)
                break
            jobs.append(job)
        return jobs


def _call(
    function: FunctionReward, prompts: list[Prompt], ids: list[list[int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[float], Counter[str]]:
    """(score of each response, NaN where it is lost; reason -> number lost)"""
    names = sorted({name for p in prompts for name in p.columns})
    columns: dict[str, list[Any]] = {name: [p.columns.get(name) for p in prompts] for name in names}
    columns.setdefault("source", [p.source for p in prompts])
    completions = tokenizer.batch_decode(ids, skip_special_tokens=True) if ids else []  # of nothing it makes one empty text
    scores, failures = function.score([p.text for p in prompts], completions, ids, columns)
    return [math.nan if s is None else s for s in scores], failures


class Rewards:
    """`score(rollout)` over all components, in the recipe's order."""

    def __init__(self, config: RewardConfig, scorers: list[Scorer], tokenizer: PreTrainedTokenizerBase, world: World) -> None:
        self.config, self.scorers, self.tokenizer, self.world = config, scorers, tokenizer, world

    def early(self) -> EarlyScorer:
        """Takes responses of one rollout as they end; give it to `score` afterwards."""
        pairs = zip(self.config.components, self.scorers, strict=True)
        return EarlyScorer({c.label: scorer for c, scorer in pairs if isinstance(scorer, FunctionReward)}, self.tokenizer, self.config.workers)

    @property
    def has_models(self) -> bool:
        return any(isinstance(scorer, RewardModel) for scorer in self.scorers)

    def score_with_models(self, rollout: Rollout) -> dict[str, Tensor]:
        """Component -> [B], of the reward models. (collective)"""
        pairs = zip(self.config.components, self.scorers, strict=True)
        return {c.label: scorer.score(rollout) for c, scorer in pairs if isinstance(scorer, RewardModel)}

    def score(self, rollout: Rollout, early: EarlyScorer | None = None, by_models: dict[str, Tensor] | None = None) -> Scores:
        """Weighted sum of clipped components, clipped, less the penalty for responses that never ended. by_models: if the models have scored.

        A row is invalid as soon as one component with a weight has no score for it. (collective)
        """
        if by_models is None:
            by_models = self.score_with_models(rollout)
        total = torch.zeros(len(rollout))
        valid = torch.ones(len(rollout), dtype=torch.bool)
        components: dict[str, Tensor] = {}
        failures: Counter[str] = Counter()
        for component, scorer in zip(self.config.components, self.scorers, strict=True):
            if isinstance(scorer, RewardModel):
                values = by_models[component.label]
            else:
                if early is not None:
                    values, lost = collect_early(component.label, early, rollout, self.world)
                else:
                    values, lost = score_with_function(scorer, rollout, self.tokenizer, self.world)
                failures.update({f"{component.label}/{reason}": n for reason, n in lost.items()})
            if component.clip is not None:
                values = values.clamp(-component.clip, component.clip)
            components[component.label] = values
            if component.weight:
                valid &= values.isfinite()
                total += component.weight * values
        if self.config.clip is not None:
            total = total.clamp(-self.config.clip, self.config.clip)
        total = total - self.config.missing_eos_penalty * (~rollout.finished).float()
        return Scores(torch.where(valid, total, torch.zeros_like(total)), valid, components, dict(failures))
