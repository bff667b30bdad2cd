"""Which rows go into which optimizer step, rank and forward: pure, deterministic, the same on every rank.

Minibatches are drawn from the rollout's global order, so their content does not depend on the number of ranks. Inside a minibatch
rows are sorted by length, cut into micro-batches and dealt to the ranks in turn: neighbours in length meet in one forward, and every
rank runs the same number of forwards (trap 23). Where the count does not work out, a rank gets a filler of weight zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf.types import MicroBatch


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


def collate(
    input_ids: Tensor, prompt_lengths: Tensor, response_lengths: Tensor, mask: Tensor, plan: MicroBatchPlan, columns: dict[str, Tensor] | None = None
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
    )


def pad_rows(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """([b, t] int64 right-padded, [b] int64 lengths)."""
    lengths = torch.tensor([len(r) for r in rows])
    padded = torch.full((len(rows), int(lengths.max())), pad)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row)
    return padded, lengths
