"""Model calls on micro-batches. Right padding under a causal mask needs no attention mask; positions are explicit (trap 8)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf.ops.logprobs import token_logprobs
from rlhf.types import MicroBatch

Forward = Callable[..., Any]


def position_ids(input_ids: Tensor) -> Tensor:
    """[b, t]: 0, 1, 2, ... in every row; what right padding gets does not matter."""
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)


def response_logprobs(forward: Forward, batch: MicroBatch, temperature: float, entropy_gradient: bool = False) -> tuple[Tensor, Tensor]:
    """([b, r] logprob of each response token, [b, r] entropy), float32; undefined beyond a response.

    Response token j of a row with p prompt tokens stands at position p + j and is scored by the logits at p + j - 1 (trap 1). The head
    is applied to the positions from the shortest prompt's end on only.
    """
    first = int(batch.prompt_lengths.min()) - 1
    last = batch.input_ids.shape[1] - 1
    keep = torch.arange(first, last, device=batch.input_ids.device)
    logits = forward(input_ids=batch.input_ids, position_ids=position_ids(batch.input_ids), use_cache=False, logits_to_keep=keep).logits
    logprobs, entropy = token_logprobs(logits, batch.input_ids[:, first + 1 :], temperature, entropy_gradient)
    index = _window(batch, first + 1)
    return logprobs.gather(1, index), entropy.gather(1, index)


def response_values(forward: Forward, batch: MicroBatch) -> Tensor:
    """[b, r + 1] float32: column j is read before response token j is known; column len is read after the last token (bootstrap)."""
    values: Tensor = forward(input_ids=batch.input_ids, position_ids=position_ids(batch.input_ids))
    offsets = torch.arange(batch.mask.shape[1] + 1, device=values.device)
    index = (batch.prompt_lengths[:, None] - 1 + offsets).clamp(max=values.shape[1] - 1)
    return values.gather(1, index)


def last_token_scores(forward: Forward, input_ids: Tensor, lengths: Tensor) -> Tensor:
    """[b] float32: the scalar at the last token of each right-padded row."""
    scores: Tensor = forward(input_ids=input_ids, position_ids=position_ids(input_ids))
    return scores.gather(1, (lengths - 1)[:, None]).squeeze(1)


def _window(batch: MicroBatch, origin: int) -> Tensor:
    """[b, r] column of each response token in a tensor whose column 0 stands for position `origin`."""
    offsets = torch.arange(batch.mask.shape[1], device=batch.input_ids.device)
    return (batch.prompt_lengths[:, None] - origin + offsets).clamp(max=batch.input_ids.shape[1] - 1 - origin)
