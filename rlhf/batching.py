"""Which rows go into which optimizer step, rank and forward: pure, deterministic, the same on every rank.

Minibatches are drawn from the rollout's global order, so their content does not depend on the number of ranks. Inside a minibatch
rows are sorted by length and cut into turns, of which each rank gets its forward: neighbours in length meet, forwards of a turn are about as long
on every rank, and every rank runs the same number of them (trap 23). Where rows do not suffice, a rank gets a filler of weight zero.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf.types import Group, MicroBatch, Packed, upload


@dataclass(frozen=True)
class MicroBatchPlan:
    """Rows of one forward on one rank. `weightless`: a filler that only keeps the ranks in step; it must train nothing."""

    rows: list[int]
    weightless: bool = False


def split_minibatches(rows: int, minibatches: int, seed: Sequence[int], shuffle: bool = True) -> list[list[int]]:
    """Rows 0..rows-1 in an order decided by the seed, cut into `minibatches` lists of equal size (rows must divide)."""
    if rows % minibatches:
        raise ValueError(f"{rows} rows do not divide into {minibatches} minibatches")
    order = np.random.default_rng(list(seed)).permutation(rows) if shuffle else np.arange(rows)
    return [part.tolist() for part in np.split(order, minibatches)]


def plan_micro_batches(
    rows: Sequence[int], lengths: Sequence[int], micro_batch: int, world_size: int, rank: int, tokens: int | None = None
) -> list[MicroBatchPlan]:
    """This rank's forwards over `rows` (indices into `lengths`); the count is the same on every rank.

    Of `micro_batch` rows each; or, for packed rows, of at most `tokens` tokens each (a longer row has a forward of its own), as few as will do and
    all about as long. Every row appears exactly once over all ranks. The filler of a rank that is short is the shortest row, without weight.
    """
    if not rows:
        raise ValueError("an empty batch cannot be planned: all its rows were lost (trap 22)")
    order = sorted(rows, key=lambda row: (-lengths[row], row))
    if tokens is None:
        turn = micro_batch * world_size
        chunks = [MicroBatchPlan(part) for i in range(0, len(order), turn) for part in _dealt(order[i : i + turn], world_size)]
    else:
        chunks = [MicroBatchPlan(part) for part in _balanced(order, lengths, tokens, world_size)]
    while len(chunks) % world_size:
        chunks.append(MicroBatchPlan([order[-1]], weightless=True))
    return chunks[rank::world_size]


def _dealt(rows: Sequence[int], world_size: int) -> list[list[int]]:
    """Rows in order of their lengths, dealt to and fro, so that no rank gets the longer ones each time."""
    parts: list[list[int]] = [[] for _ in range(min(world_size, len(rows)))]
    for i in range(0, len(rows), len(parts)):
        hand = rows[i : i + len(parts)]
        for part, row in zip(parts if i // len(parts) % 2 == 0 else reversed(parts), hand, strict=False):
            part.append(row)
    return parts


def merged(plan: Sequence[MicroBatchPlan], together: int) -> list[MicroBatchPlan]:
    """The same rows in fewer forwards, `together` of them in one; a filler is only kept where it would be alone."""
    parts = [plan[i : i + together] for i in range(0, len(plan), together)]
    real = [[p for p in part if not p.weightless] for part in parts]
    return [MicroBatchPlan([row for p in kept for row in p.rows]) if kept else part[0] for kept, part in zip(real, parts, strict=True)]


def _balanced(order: Sequence[int], lengths: Sequence[int], tokens: int, world_size: int) -> list[list[int]]:
    """Parts of at most `tokens` tokens (or one longer row), the fullest first: parts of the same turn are then about as long on every rank.

    Each row, from the longest on, goes where least is so far (Graham 1969, "Bounds on multiprocessing timing anomalies"); then rows are exchanged
    between the fullest and the emptiest part while that helps, and between parts that are too full and any others while one has to be.
    """
    turns = max(1, -(-sum(lengths[row] for row in order) // (tokens * world_size)))
    while True:
        parts: list[list[int]] = [[] for _ in range(min(turns * world_size, len(order)))]
        heap = [(0, i) for i in range(len(parts))]
        for row in order:
            load, i = heap[0]
            heapq.heapreplace(heap, (load + lengths[row], i))
            parts[i].append(row)
        loads = [sum(lengths[row] for row in part) for part in parts]
        while _exchange(parts, loads, lengths, loads.index(max(loads)), loads.index(min(loads))):
            pass
        while over := [i for i, part in enumerate(parts) if loads[i] > tokens and len(part) > 1]:  # a few tokens, maybe: any other part will do
            others = sorted(range(len(parts)), key=lambda i: loads[i])
            if not any(_exchange(parts, loads, lengths, over[0], other) for other in others):
                break
        if not over:
            return [parts[i] for i in sorted(range(len(parts)), key=lambda i: (-loads[i], i))]
        turns += 1


def _exchange(parts: list[list[int]], loads: list[int], lengths: Sequence[int], full: int, empty: int) -> bool:
    """Swap the two rows that bring two parts nearest to each other; False where none does."""
    gap = loads[full] - loads[empty]
    others = sorted((lengths[row], row) for row in parts[empty])
    best = (gap, -1, -1)
    for row in parts[full]:
        place = bisect.bisect(others, (lengths[row] - gap / 2, -1))
        for length, other in others[max(0, place - 1) : place + 1]:
            best = min(best, (abs(gap - 2 * (lengths[row] - length)), row, other))
    left, row, other = best
    if left >= gap:
        return False
    moved = lengths[row] - lengths[other]
    parts[full].remove(row)
    parts[empty].remove(other)
    parts[full].append(other)
    parts[empty].append(row)
    loads[full] -= moved
    loads[empty] += moved
    return True


def collate(
    input_ids: Tensor,
    prompt_lengths: Tensor,
    response_lengths: Tensor,
    mask: Tensor,
    plan: MicroBatchPlan,
    columns: dict[str, Tensor] | None = None,
    packing: bool = False,
) -> MicroBatch:
    """The rows of one forward, cut to their longest sequence and response; a weightless plan gets an all-False mask.

    input_ids [B, T], prompt_lengths and response_lengths [B], mask [B, R], columns [B, R or R + 1].
    """
    rows = torch.tensor(plan.rows)
    p, n = prompt_lengths[rows], response_lengths[rows]
    width, window = int((p + n).max()), int(n.max())
    return MicroBatch(
        input_ids=input_ids[rows, :width],
        prompt_lengths=p,
        response_lengths=n,
        mask=mask[rows, :window] & (not plan.weightless),
        columns={name: column[rows, :window] for name, column in (columns or {}).items()},
        packed=pack((p + n).tolist()) if packing else None,
        responses=_cells(n) if packing else None,
    )


def _cells(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(row, column) of every cell of rows of these lengths, row by row."""
    row = torch.arange(len(lengths)).repeat_interleave(lengths)
    return row, torch.arange(len(row)) - (lengths.cumsum(0) - lengths)[row]


def pack(lengths: Sequence[int]) -> Packed:
    """Sequences of these lengths one behind the other."""
    sizes = np.asarray(lengths, dtype=np.int64)
    ends = sizes.cumsum()
    positions = np.arange(ends[-1]) - (ends - sizes).repeat(sizes)
    boundaries = np.concatenate([[0], ends]).astype(np.int32)
    row = np.arange(len(sizes)).repeat(sizes)
    return Packed(torch.from_numpy(boundaries), torch.from_numpy(positions), torch.from_numpy(row), sizes.tolist(), int(sizes.max()))


PADDING = 1.25  # what a group may be padded to, as a multiple of its tokens


def in_groups(packed: Packed) -> list[Group]:
    """All sequences in their order, as padded batches with few tokens of padding in each, on the packing's device."""
    if packed.groups is None:
        device = packed.positions.device
        packed.groups = [Group(upload(g.index, device), upload(g.real, device)) for g in _groups(np.asarray(packed.lengths))]
    return packed.groups


def _groups(sizes: np.ndarray) -> Iterator[Group]:
    ends = sizes.cumsum()
    begins = ends - sizes
    first = 0
    while first < len(sizes):
        last, widest = first + 1, int(sizes[first])
        while last < len(sizes):
            wider = max(widest, int(sizes[last]))
            if wider * (last + 1 - first) > PADDING * (ends[last] - begins[first]):
                break
            last, widest = last + 1, wider
        own, start = sizes[first:last], begins[first:last]
        index = start[:, None] + np.minimum(np.arange(widest)[None, :], own[:, None] - 1)
        real = np.flatnonzero(np.arange(widest)[None, :] < own[:, None])
        yield Group(torch.from_numpy(index), torch.from_numpy(real))
        first = last


def pad_rows(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """([b, t] int64 right-padded, [b] int64 lengths)."""
    lengths = torch.tensor([len(r) for r in rows])
    padded = torch.full((len(rows), int(lengths.max())), pad)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row)
    return padded, lengths
