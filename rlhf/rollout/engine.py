"""The hybrid engine, first version: a whole replica filled from the training weights once per rollout phase, decoded in batches.

`load_weights` is the only collective call. `generate` runs on each rank alone, for as long as its own sequences take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rlhf.rollout.sampler import row_keys, sample
from rlhf.types import Prompt, Rollout, Sampling

PREFILL_TOKENS = 16_384  # most prompt tokens in one forward
LOOK_EVERY = 8  # decode steps between looks at which rows have ended (each look waits for the device)


@dataclass
class _Batch:
    """Rows that are decoded together; tensors have one entry per live row."""

    row: Tensor  # [b] int64: index into the call's rows
    key: Tensor  # [b] int64: noise key
    token: Tensor  # [b] int64: last token, to be fed
    length: Tensor  # [b] int64: tokens in the cache without padding = position of `token`
    mask: Tensor | None  # [b, cache] bool, True = attend; None: no row is padded
    cache: DynamicCache
    done: Tensor = field(init=False)  # [b] bool

    def __post_init__(self) -> None:
        self.done = torch.zeros_like(self.row, dtype=torch.bool)

    def keep(self, index: Tensor) -> None:
        for name in ("row", "key", "token", "length", "done"):
            setattr(self, name, getattr(self, name)[index])
        self.mask = None if self.mask is None else self.mask[index]
        self.cache.batch_select_indices(index)


class HybridEngine:
    """`generate(prompts, sampling) -> Rollout` on weights that `load_weights` handed over.

    replica: an empty copy of the actor's architecture on the device, which this engine owns and fills.
    """

    def __init__(self, replica: nn.Module, eos_token_ids: list[int], pad_token_id: int, max_batch: int, beat: Callable[[], None] = lambda: None):
        self.replica = replica.eval().requires_grad_(False)
        self.device = next(replica.parameters()).device
        self.eos = torch.tensor(eos_token_ids, device=self.device)
        self.pad_token_id, self.max_batch, self.beat = pad_token_id, max_batch, beat

    @torch.no_grad()
    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Fill the replica with `engine.full_tensors(...)` of the actor. (collective, through that iterator)

        Raises RuntimeError if names or shapes do not cover the replica exactly.
        """
        left = dict(self.replica.named_parameters())
        for name, tensor in tensors:
            if name not in left or left[name].shape != tensor.shape:
                raise RuntimeError(f"hand-over of weights: {name} {tuple(tensor.shape)} has no place in the replica")
            left.pop(name).copy_(tensor)
        if left:
            raise RuntimeError(f"hand-over of weights: {sorted(left)[:3]} did not arrive")

    @torch.no_grad()
    def generate(
        self, prompts: list[Prompt], draws: list[int], group_size: int, sampling: Sampling, on_finished: Callable[[int], None] | None = None
    ) -> Rollout:
        """`group_size` responses to each prompt; rows ordered as (prompt, sample). No collective.

        draws: global draw index of each prompt, which with the sample's index decides its noise. `on_finished(n)` hears how many rows
        have ended so far.
        """
        rows = [p for p in prompts for _ in range(group_size)]
        draw = torch.tensor(draws, dtype=torch.int64).repeat_interleave(group_size)
        index = torch.arange(group_size).repeat(len(prompts))
        keys = row_keys(sampling.seed, sampling.stream, draw, index).to(self.device)
        responses = torch.full((len(rows), sampling.max_new_tokens), self.pad_token_id, device=self.device)
        logprobs = torch.zeros(len(rows), sampling.max_new_tokens, device=self.device)
        lengths = torch.zeros(len(rows), dtype=torch.int64, device=self.device)
        finished = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        ended = 0
        for part in self._parts(rows):
            self._decode(part, rows, keys, sampling, responses, logprobs, lengths, finished)
            ended += len(part)
            if on_finished:
                on_finished(ended)
        lengths, responses = lengths.cpu(), responses.cpu()
        prompt_lengths = torch.tensor([len(p.input_ids) for p in rows], dtype=torch.int64)  # also on a rank without rows
        input_ids = torch.full((len(rows), int((prompt_lengths + lengths).max()) if rows else 0), self.pad_token_id)
        for i, prompt in enumerate(rows):
            p, n = len(prompt.input_ids), int(lengths[i])
            input_ids[i, :p] = torch.tensor(prompt.input_ids)
            input_ids[i, p : p + n] = responses[i, :n]
        return Rollout(rows, draw, index, input_ids, prompt_lengths, lengths, finished.cpu(), logprobs.cpu())

    def _parts(self, rows: list[Prompt]) -> Iterable[list[int]]:
        """Row indices in batches of similar prompt length. Noise does not depend on the batch, so neither do the tokens."""
        part: list[int] = []
        for i in sorted(range(len(rows)), key=lambda i: (len(rows[i].input_ids), i)):
            if part and (len(part) == self.max_batch or (len(part) + 1) * len(rows[i].input_ids) > PREFILL_TOKENS):
                yield part
                part = []
            part.append(i)
        if part:
            yield part

    def _prefill(self, part: list[int], rows: list[Prompt], keys: Tensor) -> tuple[_Batch, Tensor]:
        """Cache of the prompts and the logits [b, V] after them. Equal prompts (a group) run once, then their cache is shared out."""
        distinct: dict[tuple[int, ...], int] = {}
        owner = [distinct.setdefault(tuple(rows[i].input_ids), len(distinct)) for i in part]
        width = max(len(ids) for ids in distinct)
        input_ids = torch.full((len(distinct), width), self.pad_token_id)
        mask = torch.zeros(len(distinct), width, dtype=torch.bool)
        for ids, d in distinct.items():  # left padding: all rows decode at the same cache column
            input_ids[d, width - len(ids) :] = torch.tensor(ids)
            mask[d, width - len(ids) :] = True
        padded = not bool(mask.all())
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)  # explicit: a mask alone does not shift positions (trap 8)
        output = self.replica(
            input_ids=input_ids.to(self.device),
            attention_mask=mask.to(self.device) if padded else None,
            position_ids=positions.to(self.device),
            past_key_values=DynamicCache(config=self.replica.config),
            use_cache=True,
            logits_to_keep=1,
        )
        expand = torch.tensor(owner, device=self.device)
        cache = output.past_key_values
        cache.batch_select_indices(expand)
        row = torch.tensor(part, device=self.device)
        batch = _Batch(
            row=row,
            key=keys[row],
            token=torch.zeros_like(row),
            length=mask.sum(1).to(self.device)[expand],
            mask=mask.to(self.device)[expand] if padded else None,
            cache=cache,
        )
        return batch, output.logits[:, -1][expand]

    def _decode(
        self,
        part: list[int],
        rows: list[Prompt],
        keys: Tensor,
        sampling: Sampling,
        responses: Tensor,
        logprobs: Tensor,
        lengths: Tensor,
        finished: Tensor,
    ) -> None:
        batch, logits = self._prefill(part, rows, keys)
        for position in range(sampling.max_new_tokens):
            token, logprob = sample(logits, sampling, batch.key, torch.full_like(batch.row, position))
            live = ~batch.done
            responses[batch.row, position] = torch.where(live, token, self.pad_token_id)
            logprobs[batch.row, position] = torch.where(live, logprob, 0.0)
            lengths[batch.row] += live
            ends = torch.isin(token, self.eos) & live  # the EOS itself belongs to the response (trap 3)
            finished[batch.row] |= ends
            batch.done = batch.done | ends
            batch.token = token
            if position + 1 == sampling.max_new_tokens:
                return
            if self.device.type == "cpu" or position % LOOK_EVERY == LOOK_EVERY - 1:
                alive = (~batch.done).nonzero().squeeze(1)
                self.beat()
                if len(alive) == 0:
                    return
                if len(alive) <= 0.75 * len(batch.row):
                    batch.keep(alive)
            if batch.mask is not None:
                batch.mask = torch.nn.functional.pad(batch.mask, (0, 1), value=True)
            logits = self.replica(
                input_ids=batch.token[:, None],
                attention_mask=batch.mask,
                position_ids=batch.length[:, None],
                past_key_values=batch.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            batch.length = batch.length + 1
