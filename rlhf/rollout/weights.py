"""Rollout weights: one flat buffer at a fixed address, filled from the training weights before a rollout (`TrainEngine.hand_over`)."""

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


def vectors_last(layout: list[Slice]) -> list[Slice]:
    """Matrices before vectors, as optimizers group them: neighbours of the training weights are neighbours here, and one copy brings them all."""
    return sorted(layout, key=lambda piece: len(piece.shape) < 2)


def in_place(weights: dict[str, Tensor], layout: list[Slice], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a decoder can compute on these tensors where they lie: contiguous, joined ones behind each other, 16-byte loads possible."""
    behind = 0
    for piece in layout:
        tensor = weights[piece.name]
        at = tensor.data_ptr()
        if tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous() or (at != behind if piece.joined else at % 16):
            return False
        behind = at + tensor.numel() * tensor.element_size()
    return True


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
