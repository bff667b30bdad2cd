"""Rotary frequencies that depend on the longest position of a forward: rows of different lengths would change each other's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PretrainedConfig


def moves(rope_type: str) -> bool:
    """Whether transformers chooses the frequencies anew by the longest position of a forward (its `dynamic_rope_update`)."""
    return "dynamic" in rope_type or rope_type == "longrope"


def limit_of(config: PretrainedConfig) -> tuple[int, str] | None:
    """(tokens up to which the frequencies stay as they begin, type) where they do not always."""
    for rope in _ropes(config):
        kind = rope.get("rope_type", "default")
        if moves(kind):
            limits = [rope.get("original_max_position_embeddings"), getattr(config, "original_max_position_embeddings", None)]
            limits.append(getattr(config, "max_position_embeddings", None))
            return min((n for n in limits if n), default=0), kind
    return None


def check_length(config: PretrainedConfig, longest: int, key: str, mend: str) -> None:
    """ValueError where rows of `longest` tokens would be computed with other frequencies than shorter ones beside them."""
    if (found := limit_of(config.get_text_config())) and longest > found[0]:
        raise ValueError(
            f"{key}: {found[1]!r} rotary scaling has other frequencies past {found[0]} tokens, for every row of a forward that has one so long, and "
            f"the longest row has {longest}: {mend}"
        )


def freeze(module: nn.Module) -> None:
    """Within the length that `check_length` allows, 'dynamic' and 'longrope' keep their first frequencies, but look on the host."""
    for part in module.modules():
        rope = getattr(part, "rope_type", None)
        if isinstance(rope, str) and moves(rope):
            part.rope_type = "default"
        elif isinstance(rope, dict):
            part.rope_type = {layer_type: "default" if moves(name) else name for layer_type, name in rope.items()}


def _ropes(config: PretrainedConfig) -> Iterator[dict[str, Any]]:
    """The rope parameters of the model, or of each of its layer types."""
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in [ropes] if "rope_type" in ropes else ropes.values():
        if isinstance(rope, dict):
            yield rope
