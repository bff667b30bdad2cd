"""What travels between the parts: plain dataclasses of tensors and lists.

Shapes: B rows (one sampled response each), T tokens of a padded row, R response window, V vocabulary.
Column j of every [B, R] tensor belongs to the j-th response token, which stands at `input_ids[b, prompt_lengths[b] + j]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """A checked and tokenised prompt row."""

    input_ids: list[int]
    text: str  # what a person reads: the plain prompt, or the conversation's last user turn
    source: str  # name of the data source, for per-source metrics
    columns: dict[str, Any] = field(default_factory=dict)  # everything else of the row; reaches reward functions


@dataclass(frozen=True)
class Sequence:
    """A checked and tokenised training sequence (sft), or one side of a preference pair."""

    input_ids: list[int]
    loss_mask: list[bool]  # True where a token is trained on (assistant turns, their end included)
    source: str


@dataclass(frozen=True)
class PreferencePair:
    chosen: Sequence
    rejected: Sequence
    source: str


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens. temperature 0 = greedy. `stream` keeps training and validation noise apart (trap 34).

    Everything but temperature changes the distribution that is sampled from; `rollout_logprobs` are under that one.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and response, as in transformers
    min_new_tokens: int = 0  # no end token before
    bad_token_ids: tuple[int, ...] = ()  # never sampled
    stop: tuple[str, ...] = ()  # a response ends with the token that completes one of these texts
    entropy: bool = False  # also keep the entropy of every distribution sampled from
    seed: int = 0
    stream: int = 0  # 0 = training, 1 = validation


@dataclass
class Rollout:
    """Sampled responses, on the host, rows ordered by (draw, sample)."""

    prompts: list[Prompt]  # one per row
    draw: Tensor  # [B] int64: global index of the prompt draw
    sample: Tensor  # [B] int64: index within the group
    input_ids: Tensor  # [B, T] int64: prompt, response, right padding
    prompt_lengths: Tensor  # [B] int64
    response_lengths: Tensor  # [B] int64; the EOS counts
    finished: Tensor  # [B] bool: ended by an EOS or a stop text (else by the window)
    rollout_logprobs: Tensor  # [B, R] float32, as sampled; 0 beyond the response
    entropies: Tensor | None = None  # [B, R] float32, of the distributions sampled from; only where asked for

    def tensors(self) -> dict[str, Tensor]:
        """All but the prompts."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], of_draw: Mapping[int, Prompt]) -> Rollout:
        """From `tensors()` and the prompt of every draw."""
        return cls(prompts=[of_draw[d] for d in tensors["draw"].tolist()], **tensors)

    @property
    def response_mask(self) -> Tensor:
        """[B, R] bool, True on response tokens, the ending EOS included."""
        window = torch.arange(self.rollout_logprobs.shape[1])
        return window[None, :] < self.response_lengths[:, None]

    def response_ids(self, row: int) -> list[int]:
        start = int(self.prompt_lengths[row])
        ids: list[int] = self.input_ids[row, start : start + int(self.response_lengths[row])].tolist()
        return ids

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass
class Scores:
    """What the rewards say of each row. A row that no scorer could judge is invalid: it is kept, trains nothing and is counted."""

    total: Tensor  # [B] float32; 0 where invalid
    valid: Tensor  # [B] bool
    components: dict[str, Tensor]  # name -> [B] float32, NaN where that component failed
    failures: dict[str, int]  # name -> number of failed samples in this batch

    def tensors(self) -> dict[str, Tensor]:
        parts = {f"component/{name}": values for name, values in self.components.items()}
        parts |= {f"failure/{reason}": torch.tensor(count) for reason, count in self.failures.items()}
        return {"total": self.total, "valid": self.valid, **parts}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Scores:
        """From `tensors()`."""

        def parts(kind: str) -> dict[str, Tensor]:
            return {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}

        return cls(tensors["total"], tensors["valid"], parts("component/"), {reason: int(n) for reason, n in parts("failure/").items()})


@dataclass
class Experience:
    """A rollout with everything the update needs, on the host, the same on every rank (28 bytes a token; any rank may train any row)."""

    rollout: Rollout
    scores: Scores
    mask: Tensor  # [B, R] bool: tokens that train
    # [B, R] float32, of the policy before the update; None until the update's own forwards give them, or for good if nothing needs them
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None  # [B, R] float32
    values: Tensor | None  # [B, R + 1] float32: values[:, j] precedes token j; the one after the last token is the bootstrap
    rewards: Tensor  # [B, R] float32 per token, KL penalty included
    advantages: Tensor  # [B, R] float32
    returns: Tensor | None  # [B, R] float32


@dataclass
class Group:
    """Sequences that lie next to each other in a packed row, as a padded batch."""

    index: Tensor  # [g, w] int64 into the packed row; beyond a sequence any token of it
    real: Tensor  # [tokens of the group] int64 into the flattened [g, w]


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for what it does: only a copy from pinned memory does not."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass
class Packed:
    """Where b sequences lie in one packed row of t tokens."""

    boundaries: Tensor  # [b + 1] int32: where each begins, and the end
    positions: Tensor  # [t] int64: 0, 1, 2, ... in every sequence
    row: Tensor  # [t] int64: which sequence
    lengths: list[int]
    longest: int  # beside the lengths: a compiled layer that looked at a list would be compiled again for every other
    groups: list[Group] | None = None  # `batching.in_groups`, once somebody has asked

    def to(self, device: torch.device) -> Packed:
        return Packed(upload(self.boundaries, device), upload(self.positions, device), upload(self.row, device), self.lengths, self.longest)


@dataclass
class MicroBatch:
    """One forward: rows of an experience on the device, cut to the longest row. A row with an all-False mask has weight zero."""

    input_ids: Tensor  # [b, t] int64
    prompt_lengths: Tensor  # [b] int64
    response_lengths: Tensor  # [b] int64
    mask: Tensor  # [b, r] bool
    columns: dict[str, Tensor]  # [b, r] tensors by name: old_logprobs, advantages, ...
    packed: Packed | None = None  # how the rows are to be packed for the model; None = padded as they are
    responses: tuple[Tensor, Tensor] | None = None  # packed: (row, column) of every response token, [s] int64 each, row by row

    def to(self, device: torch.device) -> MicroBatch:
        columns = {name: upload(column, device) for name, column in self.columns.items()}
        packed = self.packed.to(device) if self.packed is not None else None
        responses = None if self.responses is None else (upload(self.responses[0], device), upload(self.responses[1], device))
        ids, mask = upload(self.input_ids, device), upload(self.mask, device)
        return MicroBatch(ids, upload(self.prompt_lengths, device), upload(self.response_lengths, device), mask, columns, packed, responses)


@dataclass
class LossOutput:
    """A loss as a sum over this micro-batch; what it is a mean over is counted globally, over the whole optimizer step."""

    loss_sum: Tensor  # scalar with grad
    metrics: dict[str, Tensor]  # name -> scalar sum over this micro-batch; divided by the global token count when reported
    logprobs: Tensor | None = None  # [b, r] of the policy that the loss was computed with, without gradient
