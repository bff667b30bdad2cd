"""Model calls on micro-batches, packed or padded. Right padding under a causal mask needs no attention mask; positions are explicit (trap 8)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf.models.packing import announce
from rlhf.models.scoring_head import logprobs_of
from rlhf.types import MicroBatch, Packed

Forward = Callable[..., Any]


def position_ids(input_ids: Tensor) -> Tensor:
    """[b, t]: 0, 1, 2, ... in every row; what right padding gets does not matter."""
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)


def inputs_of(input_ids: Tensor, packed: Packed | None) -> dict[str, Any]:
    """What a model is called with: the right-padded rows [b, t], or their tokens one behind the other in [1, tokens]."""
    if packed is None:
        return {"input_ids": input_ids, "position_ids": position_ids(input_ids), "use_cache": False}
    announce(packed)
    ids = input_ids[packed.row, packed.positions]
    return {"input_ids": ids[None], "position_ids": packed.positions[None], "use_cache": False, "packed": packed}


def response_logprobs(forward: Forward, batch: MicroBatch, temperature: float, entropy_gradient: bool = False) -> tuple[Tensor, Tensor]:
    """([b, r] logprob of each response token, [b, r] entropy), float32; undefined beyond a response.

    Response token j of a row with p prompt tokens stands at position p + j and is scored by the logits at p + j - 1 (trap 1). The head
    is applied to the positions from the shortest prompt's end on only; packed, to those that score a response token.
    """
    packed = batch.packed
    if packed is None:
        first = int(batch.prompt_lengths.min()) - 1
        last = batch.input_ids.shape[1] - 1
        keep = torch.arange(first, last, device=batch.input_ids.device)
        tokens = batch.input_ids[:, first + 1 :]
        logprobs, entropy = logprobs_of(forward, inputs_of(batch.input_ids, None), keep, tokens, temperature, entropy_gradient)
        index = _window(batch, first + 1)
        return logprobs.gather(1, index), entropy.gather(1, index)
    assert batch.responses is not None
    row, column = batch.responses
    place = packed.boundaries[row].long() + batch.prompt_lengths[row] + column  # of each response token in the packed row
    inputs = inputs_of(batch.input_ids, packed)
    found = logprobs_of(forward, inputs, place - 1, inputs["input_ids"][:, place], temperature, entropy_gradient)
    logprobs, entropy = (torch.zeros(batch.mask.shape, device=t.device).index_put((row, column), t[0]) for t in found)
    return logprobs, entropy


def response_values(forward: Forward, batch: MicroBatch) -> Tensor:
    """[b, r + 1] float32: column j is read before response token j is known; column len is read after the last token (bootstrap)."""
    offsets = torch.arange(batch.mask.shape[1] + 1, device=batch.input_ids.device)
    index = batch.prompt_lengths[:, None] - 1 + offsets
    inputs = inputs_of(batch.input_ids, batch.packed)
    inputs.pop("use_cache")
    values: Tensor = forward(**inputs)
    if batch.packed is None:
        return values.gather(1, index.clamp(max=values.shape[1] - 1))
    ends = batch.packed.boundaries.long()
    return values[0][torch.minimum(ends[:-1, None] + index, ends[1:, None] - 1)]


def last_token_scores(forward: Forward, input_ids: Tensor, lengths: Tensor, packed: Packed | None = None) -> Tensor:
    """[b] float32: the scalar at the last token of each right-padded row."""
    inputs = inputs_of(input_ids, packed)
    inputs.pop("use_cache")
    scores: Tensor = forward(**inputs)
    if packed is None:
        return scores.gather(1, (lengths - 1)[:, None]).squeeze(1)
    return scores[0][packed.boundaries[1:].long() - 1]


def _window(batch: MicroBatch, origin: int) -> Tensor:
    """[b, r] column of each response token in a tensor whose column 0 stands for position `origin`."""
    offsets = torch.arange(batch.mask.shape[1], device=batch.input_ids.device)
    return (batch.prompt_lengths[:, None] - origin + offsets).clamp(max=batch.input_ids.shape[1] - 1 - origin)
