"""Rewards of responses that have ended, while others are still decoded."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest

from rlhf.config import RewardComponentConfig
from rlhf.rewards.compose import EarlyScorer
from rlhf.rewards.functions import FunctionReward
from rlhf.rewards.pool import Pool
from rlhf.types import Prompt
from tests.helpers import tiny_tokenizer


def run(pool: Pool, name: str, count: int, together: bool = False, **arguments: Any) -> tuple[EarlyScorer, float]:
    function = FunctionReward(RewardComponentConfig(function=f"tests.scorers:{name}", arguments=arguments))
    early = EarlyScorer({"scorer": function}, tiny_tokenizer(), pool, together)
    started = time.perf_counter()
    for i in reversed(range(count)):
        early.submit(Prompt([4], "a", "test"), i // 4, i % 4, [4 + i])
    early.close()
    early.finish()
    return early, time.perf_counter() - started


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
def test_every_response_is_scored_once(workers: int, together: bool) -> None:
    with Pool(["tests.scorers:first_token"], workers) as pool:
        early, _ = run(pool, "first_token", 40, together)
    found = early.scores["scorer"]
    assert len(found) == 40 and early.failures["scorer"] == Counter({"None": 20})
    assert all(found[i // 4, i % 4] == 4 + i for i in range(0, 40, 2))


def test_together_is_one_call_in_the_order_of_draws() -> None:
    with Pool(["tests.scorers:position"], 1) as pool:
        assert list(run(pool, "position", 12, together=True)[0].scores["scorer"].items()) == [((i // 4, i % 4), float(i)) for i in range(12)]


def test_workers_wait_side_by_side() -> None:
    """64 samples of 20 ms: 1.28 s by one, 0.16 s by eight."""
    for workers, least, most in ((8, 0.1, 0.9), (1, 1.2, 60)):
        with Pool(["tests.scorers:waiting"], workers) as pool:
            run(pool, "waiting", 8, seconds=0.001)  # all there
            assert least < run(pool, "waiting", 64, seconds=0.02)[1] < most


def test_calls_are_as_large_as_time_allows(caplog: pytest.LogCaptureFixture) -> None:
    """A sample takes 0.1 s, a call may take 1.2: so three samples at once, and none is ever repeated; the score is the size of the call."""
    with Pool(["tests.scorers:waiting"], 1, timeout=1.2) as pool:
        run(pool, "waiting", 1, seconds=0.1)
        early, _ = run(pool, "waiting", 16, seconds=0.1)
    assert 1 <= max(early.scores["scorer"].values()) <= 4 and not early.failures["scorer"] and not caplog.records


def test_nobody_is_left_waiting_by_what_a_thread_dies_of() -> None:
    with Pool(["tests.scorers:half"], 2) as pool:
        early = EarlyScorer({"scorer": FunctionReward(RewardComponentConfig(function="tests.scorers:half"))}, None, pool)  # type: ignore[arg-type]
        early.submit(Prompt([4], "a", "test"), 0, 0, [4])
        early.close()
        beats: list[int] = []
        with pytest.raises(AttributeError, match="batch_decode"):
            early.finish(lambda: beats.append(1))
        assert beats
