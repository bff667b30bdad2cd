"""trap 27: whatever the scorers of one rank do, all ranks have the same scores, and wait for them outside of any collective."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlhf.config import RewardConfig
from rlhf.distributed import World
from rlhf.rewards.compose import Rewards
from rlhf.rewards.functions import FunctionReward
from rlhf.rewards.pool import Pool
from rlhf.types import Scores
from tests.helpers import make_rollout, run_ranks, tiny_tokenizer


def score(world: World, function: str) -> tuple[Scores, int]:
    """Rows in turn; half of rank 1's are bad. With the number of beats."""
    rollout = make_rollout([2] * 8, [3] * 8, window=3)
    rollout.prompts = [replace(p, text="bad" if row % 4 == 1 else "good") for row, p in enumerate(rollout.prompts)]
    config = RewardConfig(components=[{"function": f"tests.scorers:{function}"}], timeout=1.5)  # type: ignore[list-item]
    beats: list[int] = []
    world.beat = lambda: beats.append(1)  # type: ignore[method-assign]
    with Pool([f"tests.scorers:{function}"], 1, config.timeout) as pool:
        rewards = Rewards(config, [FunctionReward(c) for c in config.components], tiny_tokenizer(), world, pool)
        early = rewards.early()
        for row in range(world.rank, 8, world.size):
            early.submit(rollout.prompts[row], row, 0, rollout.response_ids(row))
        early.close()
        return rewards.score(rollout, early, {}), len(beats)


@pytest.mark.parametrize(("function", "reason"), [("exits", "died (exit 3)"), ("endless", "timeout")])
def test_ranks_agree_where_the_scorer_of_one_dies_or_hangs(function: str, reason: str) -> None:
    (one, _), (two, beats) = run_ranks(score, 2, function)
    assert torch.equal(one.total, two.total) and torch.equal(one.valid, two.valid)
    assert one.failures == two.failures == {f"{function}/{reason}": 2}
    assert one.valid.tolist() == [row % 4 != 1 for row in range(8)]
    assert one.total.tolist() == [float(row % 4 != 1) for row in range(8)]
    if function == "endless":
        assert beats >= 3, "a rank that waits for its scorer shows that it lives"
