"""Rollout weights: one flat buffer at a fixed address, filled from the training weights once per rollout phase."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGN = 128  # elements: every matrix starts where 16-byte loads want it


@dataclass(frozen=True)
class Slice:
    """One tensor's place in the buffer. joined: directly behind the one before it, so that both are one matrix."""

    name: str
    shape: tuple[int, ...]
    joined: bool = False


def _places(layout: list[Slice]) -> list[tuple[Slice, int, int]]:
    """(slice, first element, one past its last element)"""
    placed, at = [], 0
    for piece in layout:
        start = at if piece.joined else -(-at // ALIGN) * ALIGN
        at = start + math.prod(piece.shape)
        placed.append((piece, start, at))
    return placed


def buffer_elements(layout: list[Slice]) -> int:
    return _places(layout)[-1][2]


def views(buffer: Tensor, layout: list[Slice]) -> dict[str, Tensor]:
    """Name -> its part of the flat `buffer`."""
    return {piece.name: buffer[start:end].view(piece.shape) for piece, start, end in _places(layout)}


@torch.no_grad()
def fill(weights: dict[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy whole tensors to their places. RuntimeError if names or shapes do not cover `weights` exactly (trap 21)."""
    left = dict(weights)
    for name, tensor in tensors:
        if name not in left or left[name].shape != tensor.shape:
            raise RuntimeError(f"hand-over of weights: {name} {tuple(tensor.shape)} has no place in the rollout's weights")
        left.pop(name).copy_(tensor)
    if left:
        raise RuntimeError(f"hand-over of weights: {sorted(left)[:3]} did not arrive")
