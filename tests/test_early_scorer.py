"""Rewards of responses that have ended, while others are still decoded."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest

from rlhf.rewards.compose import EarlyScorer
from rlhf.types import Prompt
from tests.helpers import tiny_tokenizer


class Waiting:
    """Takes `seconds` for each sample, as a server does; its score is the response's first token id, odd ones are lost."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.calls = seconds, 0

    def score(self, prompts: list[str], completions: list[str], ids: list[list[int]], columns: dict[str, Any]) -> tuple[list[Any], Counter[str]]:
        self.calls += 1
        time.sleep(self.seconds * len(ids))
        scores = [None if row[0] % 2 else float(row[0]) for row in ids]
        return scores, Counter({"odd": scores.count(None)})


def run(function: Any, workers: int, count: int) -> tuple[EarlyScorer, float]:
    early = EarlyScorer({"waiting": function}, tiny_tokenizer(), workers)
    started = time.perf_counter()
    for i in range(count):
        early.submit(Prompt([4], "a", "test"), i // 4, i % 4, [4 + i])
    early.finish()
    return early, time.perf_counter() - started


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_every_response_is_scored_once(workers: int) -> None:
    early, _ = run(Waiting(), workers, 50)
    found = early.scores["waiting"]
    assert len(found) == 50 and early.failures["waiting"] == Counter({"odd": 25})
    assert all(found[i // 4, i % 4] == 4 + i for i in range(0, 50, 2))


def test_workers_wait_side_by_side() -> None:
    """64 samples of 20 ms: 1.28 s by one, 0.16 s by eight."""
    assert run(Waiting(0.02), 8, 64)[1] < 0.6
    assert run(Waiting(0.02), 1, 64)[1] > 1.2


def test_what_a_worker_dies_of_is_raised() -> None:
    class Broken:
        def score(self, *_: Any) -> None:
            raise KeyboardInterrupt("stop")

    with pytest.raises(KeyboardInterrupt):
        run(Broken(), 4, 20)
