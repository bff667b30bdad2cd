"""Which rows go into which optimizer step, rank and forward: pure, deterministic, the same on every rank.

Minibatches are drawn from the rollout's global order, so their content does not depend on the number of ranks. Inside a minibatch
rows are sorted by length, cut into micro-batches and dealt to the ranks in turn: neighbours in length meet in one forward, and every
rank runs the same number of forwards (trap 23). Where the count does not work out, a rank gets a filler of weight zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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


def plan_micro_batches(rows: Sequence[int], lengths: Sequence[int], micro_batch: int, world_size: int, rank: int) -> list[MicroBatchPlan]:
    """This rank's forwards over `rows` (indices into `lengths`); the count is the same on every rank.

    Every row appears exactly once over all ranks. The filler of a rank that is short is the shortest row, without weight.
    """
    if not rows:
        raise ValueError("an empty batch cannot be planned: all its rows were lost (trap 22)")
    order = sorted(rows, key=lambda row: (-lengths[row], row))
    chunks = [MicroBatchPlan(order[i : i + micro_batch]) for i in range(0, len(order), micro_batch)]
    while len(chunks) % world_size:
        chunks.append(MicroBatchPlan([order[-1]], weightless=True))
    return chunks[rank::world_size]
