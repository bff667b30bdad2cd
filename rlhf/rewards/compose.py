"""The weighted sum of all rewards, with what failed counted and left out."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.config import RewardConfig
from rlhf.distributed import World
from rlhf.rewards.functions import FunctionReward
from rlhf.rewards.model import RewardModel
from rlhf.rewards.pool import Pool
from rlhf.types import Prompt, Rollout, Scores

Scorer = FunctionReward | RewardModel


def collect(name: str, early: EarlyScorer, rollout: Rollout, world: World) -> tuple[Tensor, Counter[str]]:
    """([B] float32 with NaN where a sample is lost, reason -> number lost), of what each rank has scored of its own responses. (collective)"""
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
    """Function rewards of responses as they end, by a thread for each worker of the pool, which waits for it. One for each rollout.

    together: one call of each function, with all responses, once there are no more.
    """

    def __init__(self, functions: dict[str, FunctionReward], tokenizer: PreTrainedTokenizerBase, pool: Pool, together: bool = False) -> None:
        self.functions, self.tokenizer, self.pool, self.together = functions, tokenizer, pool, together
        self.scores: dict[str, dict[tuple[int, int], float]] = {name: {} for name in functions}  # NaN where a sample is lost
        self.failures: dict[str, Counter[str]] = {name: Counter() for name in functions}
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        workers = min(len(pool.workers), 1 if together else len(pool.workers))
        self._threads = [threading.Thread(target=self._work, name=f"scorer-{i}", daemon=True) for i in range(workers)]
        if not together:
            self._start()

    def _start(self) -> None:
        for thread in self._threads:
            thread.start()

    def submit(self, prompt: Prompt, draw: int, sample: int, ids: list[int]) -> None:
        self._jobs.put(_Job(prompt, (draw, sample), ids))

    def take(self, rollout: Rollout, rows: Iterable[int]) -> None:
        """These rows of a rollout that has been made, and no more."""
        for row in rows:
            self.submit(rollout.prompts[row], int(rollout.draw[row]), int(rollout.sample[row]), rollout.response_ids(row))
        self.close()

    def close(self) -> None:
        """There will be no more."""
        for _ in self._threads:
            self._jobs.put(None)
        if self.together:
            self._start()

    def finish(self, beat: Callable[[], None] = lambda: None) -> None:
        """Wait, after `close`, for what is still being scored; raises what a thread died of. beat: called every second."""
        for thread in self._threads:
            while thread.is_alive():
                thread.join(1.0)
                beat()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            while batch := self._take():
                began = time.monotonic()
                self._score(sorted(batch, key=lambda job: job.key))
                self.pool.pace = (time.monotonic() - began) / len(batch)
        except BaseException as error:  # handed to the caller of `finish`
            self._error = error

    def _score(self, jobs: list[_Job]) -> None:
        prompts, ids = [job.prompt for job in jobs], [job.ids for job in jobs]
        names = sorted({name for p in prompts for name in p.columns})
        columns: dict[str, list[Any]] = {name: [p.columns.get(name) for p in prompts] for name in names}
        columns.setdefault("source", [p.source for p in prompts])
        completions = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        for name, function in self.functions.items():
            scores, failures = self.pool.score(function, [p.text for p in prompts], completions, ids, columns)
            with self._lock:
                self.scores[name].update({job.key: math.nan if s is None else s for job, s in zip(jobs, scores, strict=True)})
                self.failures[name] += failures

    def _take(self) -> list[_Job]:
        """The next job, with this thread's share of whatever else has ended meanwhile, for the same call: but not more than a quarter of the time
        for a call will do, at the last one's pace. Empty: there will be no more."""
        job = self._jobs.get()
        jobs = [] if job is None else [job]
        more = self._jobs.qsize() // len(self._threads)
        if self.pool.pace and not self.together:
            more = min(more, int(self.pool.timeout / 4 / self.pool.pace))
        with contextlib.suppress(queue.Empty):
            for _ in range(more if jobs else 0):
                if (job := self._jobs.get_nowait()) is None:  # another thread's sign to end
                    self._jobs.put(None)
                    break
                jobs.append(job)
        return jobs


class Rewards:
    """`score(rollout)` over all components, in the recipe's order."""

    def __init__(self, config: RewardConfig, scorers: list[Scorer], tokenizer: PreTrainedTokenizerBase, world: World, pool: Pool) -> None:
        self.config, self.scorers, self.tokenizer, self.world, self.pool = config, scorers, tokenizer, world, pool

    def early(self, further: dict[str, FunctionReward] | None = None) -> EarlyScorer:
        """Takes this rank's responses of one rollout as they end, for `score`; `further` functions score them too, for `collect`."""
        pairs = zip(self.config.components, self.scorers, strict=True)
        functions = {c.label: scorer for c, scorer in pairs if isinstance(scorer, FunctionReward)}
        return EarlyScorer(functions | (further or {}), self.tokenizer, self.pool, together=not self.config.while_decoding)

    @property
    def has_models(self) -> bool:
        return any(isinstance(scorer, RewardModel) for scorer in self.scorers)

    def score_with_models(self, rollout: Rollout) -> dict[str, Tensor]:
        """Component -> [B], of the reward models. (collective)"""
        pairs = zip(self.config.components, self.scorers, strict=True)
        return {c.label: scorer.score(rollout) for c, scorer in pairs if isinstance(scorer, RewardModel)}

    def score(self, rollout: Rollout, early: EarlyScorer, by_models: dict[str, Tensor]) -> Scores:
        """Weighted sum of clipped components, clipped, less the penalty for responses that never ended.

        early: closed; waited for. by_models: of `score_with_models`. A row is invalid as soon as one component with a weight has no score for it, or
        the sum is not finite. (collective)
        """
        early.finish(self.world.beat)
        self.world.wait_for_all("reward")  # however long the scorers of another rank take
        total = torch.zeros(len(rollout))
        valid = torch.ones(len(rollout), dtype=torch.bool)
        components: dict[str, Tensor] = {}
        failures: Counter[str] = Counter()
        for component, scorer in zip(self.config.components, self.scorers, strict=True):
            if isinstance(scorer, RewardModel):
                values = by_models[component.label]
            else:
                values, lost = collect(component.label, early, rollout, self.world)
                failures.update({f"{component.label}/{reason}": n for reason, n in lost.items()})
            if component.clip is not None:
                values = values.clamp(-component.clip, component.clip)
            components[component.label] = values
            if component.weight:
                valid &= values.isfinite()
                total += component.weight * values
        if self.config.clip is not None:
            total = total.clamp(-self.config.clip, self.config.clip)
        if endless := int((valid & ~total.isfinite()).sum()):
            failures["sum/infinite"] = endless
            valid &= total.isfinite()
        total = total - self.config.missing_eos_penalty * (~rollout.finished).float()
        return Scores(torch.where(valid, total, torch.zeros_like(total)), valid, components, dict(failures))
