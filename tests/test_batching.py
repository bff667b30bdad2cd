"""Plans: every row exactly once, the same number of forwards on every rank (trap 23), whatever the sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.batching import MicroBatchPlan, collate, in_groups, merged, pack, pad_rows, plan_micro_batches, split_minibatches
from scripts.bench_planner import measures
from scripts.workloads import step_lengths

sizes = st.lists(st.integers(1, 60), min_size=1, max_size=50)


@given(sizes, st.integers(1, 9), st.integers(1, 9), st.randoms(use_true_random=False))
def test_trap_23_every_row_once_and_equal_counts(lengths: list[int], micro_batch: int, ranks: int, random: object) -> None:
    """trap 23"""
    rows = [i for i in range(len(lengths)) if random.random() < 0.8] or [0]  # type: ignore[attr-defined]
    plans = [plan_micro_batches(rows, lengths, micro_batch, ranks, rank) for rank in range(ranks)]
    assert len({len(plan) for plan in plans}) == 1
    assert len(plans[0]) >= 1
    assert sorted(row for plan in plans for part in plan if not part.weightless for row in part.rows) == rows
    assert all(1 <= len(part.rows) <= micro_batch and set(part.rows) <= set(rows) for plan in plans for part in plan)
    # No more fillers than ranks - 1, and no rank waits for a long row of another's while it has a filler of its own.
    assert sum(part.weightless for plan in plans for part in plan) < ranks


@given(sizes, st.integers(1, 150), st.integers(1, 9), st.randoms(use_true_random=False))
def test_trap_23_every_row_once_within_the_token_budget(lengths: list[int], tokens: int, ranks: int, random: object) -> None:
    """trap 23"""
    rows = [i for i in range(len(lengths)) if random.random() < 0.8] or [0]  # type: ignore[attr-defined]
    plans = [plan_micro_batches(rows, lengths, 1, ranks, rank, tokens) for rank in range(ranks)]
    assert len({len(plan) for plan in plans}) == 1
    assert sorted(row for plan in plans for part in plan if not part.weightless for row in part.rows) == rows
    assert all(len(part.rows) == 1 or sum(lengths[row] for row in part.rows) <= tokens for plan in plans for part in plan)
    assert sum(part.weightless for plan in plans for part in plan) < ranks
    assert plans[0] == plan_micro_batches(rows[::-1], lengths, 1, ranks, 0, tokens)


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("tokens", [8_192, 16_384, 32_768, 49_152])
@pytest.mark.parametrize("workload", "ABVT")
def test_forwards_are_full_equal_and_few(workload: str, tokens: int, ranks: int) -> None:
    """As few forwards as will do, of about equal lengths, on every rank. 256 rows of 640 tokens (T) may not divide, however they are dealt."""
    _, _, before, responses = step_lengths(workload, 1.0)
    lengths = (responses + before).tolist()
    found = measures(lengths, ranks, tokens=tokens)
    alike = -(-len(lengths) // (tokens // lengths[0])) if min(lengths) == max(lengths) else 0
    assert found["forwards"] == -(-max(alike, -(-sum(lengths) // tokens)) // ranks), found
    assert found["imbalance"] <= 1.02, found
    assert found["fill"] >= (0.97 if not alike else len(lengths) / ranks / found["forwards"] / -(-len(lengths) / ranks // found["forwards"])), found


@pytest.mark.parametrize("micro_batch", [8, 16])
@pytest.mark.parametrize("workload", "ABV")
def test_forwards_of_so_many_rows_are_as_long_on_every_rank(workload: str, micro_batch: int) -> None:
    _, _, before, responses = step_lengths(workload, 1.0)
    for ranks in (1, 2, 8):
        found = measures((responses + before).tolist(), ranks, micro_batch=micro_batch)
        assert found["imbalance"] <= 1.02 and found["imbalance_padded"] <= 1.02, (ranks, found)


@given(sizes, st.integers(1, 9))
def test_neighbours_in_length_meet(lengths: list[int], micro_batch: int) -> None:
    (*plan,) = plan_micro_batches(range(len(lengths)), lengths, micro_batch, 1, 0)
    ordered = [lengths[row] for part in plan for row in part.rows]
    assert ordered == sorted(lengths, reverse=True)


@given(sizes, st.integers(1, 5), st.integers(1, 5))
def test_plan_depends_on_the_set_of_rows_only(lengths: list[int], micro_batch: int, ranks: int) -> None:
    rows = list(range(len(lengths)))
    assert plan_micro_batches(rows, lengths, micro_batch, ranks, 0) == plan_micro_batches(rows[::-1], lengths, micro_batch, ranks, 0)


@given(sizes, st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_trap_23_merged_forwards_have_every_row_once_and_equal_counts(lengths: list[int], micro_batch: int, ranks: int, together: int) -> None:
    """trap 23"""
    plans = [plan_micro_batches(range(len(lengths)), lengths, micro_batch, ranks, rank) for rank in range(ranks)]
    wide = [merged(plan, together) for plan in plans]
    assert len({len(plan) for plan in wide}) == 1
    for plan, other in zip(plans, wide, strict=True):
        assert len(other) == -(-len(plan) // together)
        assert [r for p in plan if not p.weightless for r in p.rows] == [r for p in other if not p.weightless for r in p.rows]
        assert all(len(p.rows) <= together * micro_batch for p in other)


def test_trap_22_an_empty_batch_is_refused() -> None:
    """trap 22"""
    with pytest.raises(ValueError, match=r"an empty batch cannot be planned.*trap 22"):
        plan_micro_batches([], [], 4, 2, 0)


@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 1000), st.integers(0, 3))
def test_minibatches_cut_a_permutation(minibatches: int, size: int, seed: int, epoch: int) -> None:
    rows = minibatches * size
    parts = split_minibatches(rows, minibatches, (seed, epoch))
    assert [len(part) for part in parts] == [size] * minibatches
    assert sorted(row for part in parts for row in part) == list(range(rows))
    assert parts == split_minibatches(rows, minibatches, (seed, epoch))


def test_minibatches_change_with_step_and_epoch() -> None:
    orders = {str(split_minibatches(32, 4, (0, step, epoch))) for step in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_minibatches_must_divide() -> None:
    with pytest.raises(ValueError, match="10 rows do not divide into 4 minibatches"):
        split_minibatches(10, 4, (0,))


def test_collate_by_hand() -> None:
    ids = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8], [9, 1, 0, 0, 0]])
    prompts, responses = torch.tensor([2, 2, 1]), torch.tensor([1, 3, 1])
    mask = torch.tensor([[True, False, False], [True, True, True], [True, False, False]])
    columns = {"values": torch.arange(12).reshape(3, 4)}
    batch = collate(ids, prompts, responses, mask, MicroBatchPlan([2, 0]), columns)
    assert batch.input_ids.tolist() == [[9, 1, 0], [1, 2, 3]]
    assert batch.mask.tolist() == [[True], [True]]
    assert batch.columns["values"].tolist() == [[8], [0]]
    assert batch.prompt_lengths.tolist() == [1, 2]


def test_trap_23_a_filler_trains_nothing() -> None:
    """trap 23"""
    ones = torch.ones(2, dtype=torch.int64)
    batch = collate(torch.ones(2, 2, dtype=torch.int64), ones, ones, torch.ones(2, 1, dtype=torch.bool), MicroBatchPlan([1], weightless=True))
    assert not batch.mask.any()


def test_pad_rows() -> None:
    padded, lengths = pad_rows([[1, 2, 3], [4]], 9)
    assert padded.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert lengths.tolist() == [3, 1]


@given(sizes)
def test_packed_rows_and_their_groups(lengths: list[int]) -> None:
    """Positions begin anew with every sequence; the groups cover each token once, in order, with little padding."""
    packed = pack(lengths)
    assert packed.positions.tolist() == [j for n in lengths for j in range(n)]
    assert packed.row.tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    assert packed.boundaries.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert packed.longest == max(lengths)
    groups = in_groups(packed)
    assert in_groups(packed) is groups
    tokens = torch.cat([group.index.flatten()[group.real] for group in groups])
    assert tokens.tolist() == list(range(sum(lengths)))
    assert all(group.index.numel() <= 1.25 * len(group.real) for group in groups)
    for group in groups:  # a sequence's row holds nothing of another
        rows = packed.row[group.index]
        assert (rows == rows[:, :1]).all()
