"""The decode loop as the device sees it: the state of every batch slot, what was sampled so far, and one step for all slots.

On a GPU a step is one captured graph per batch size: forward, sampling, bookkeeping, the next page. The host replays it and looks now and then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from rlhf.rollout import kernels
from rlhf.rollout.decoder import Decoder
from rlhf.rollout.paged import DecodeStep, PagedCache
from rlhf.rollout.sampler import plain, sample, shape_logits
from rlhf.types import Sampling


@dataclass
class Slots:
    """One entry per batch slot; the first `used` (which the host knows) may be live."""

    row: Tensor  # [S] int64: row of the outputs
    token: Tensor  # [S] int64: last token, to be fed
    length: Tensor  # [S] int64: tokens in the cache = position of `token`
    new: Tensor  # [S] int64: response tokens so far
    key: Tensor  # [S] int64: noise key
    limit: Tensor  # [S] int64: most response tokens
    least: Tensor  # [S] int64: no end token before so many
    live: Tensor  # [S] bool

    @classmethod
    def empty(cls, slots: int, device: torch.device) -> Slots:
        names = [f.name for f in fields(cls)]
        return cls(**{n: torch.zeros(slots, dtype=torch.bool if n == "live" else torch.int64, device=device) for n in names})

    def put(self, slots: slice, **values: Tensor) -> None:
        for name, value in values.items():
            getattr(self, name)[slots] = value

    def reorder(self, order: Tensor) -> None:
        """Slot i takes what slot order[i] held, for the first len(order) slots."""
        for f in fields(self):
            tensor = getattr(self, f.name)
            tensor[: len(order)] = tensor[order]


def shape_of(sampling: Sampling) -> Sampling:
    """What of it a captured step depends on."""
    return replace(sampling, max_new_tokens=0, seed=0, stream=0, stop=())


def forbids(sampling: Sampling) -> bool:
    return bool(sampling.bad_token_ids) or sampling.min_new_tokens > 0


@dataclass
class Outputs:
    """One entry per row of the call. `forced` [R] int64: a row ends exactly there (0 = by itself); `lengths` itself where nothing is forced."""

    ids: Tensor  # [R, W] int32
    logprobs: Tensor  # [R, W] float32
    lengths: Tensor  # [R] int64
    finished: Tensor  # [R] bool: ended by an end token
    forced: Tensor  # [R] int64
    entropies: Tensor | None  # [R, W] float32
    seen: Tensor | None  # [R, V] bool: tokens of prompt and response, for the repetition penalty
    forbidden: dict[tuple[int, ...], Tensor]  # bad tokens -> [V] uint8: these, and end tokens, which may not come too early

    @classmethod
    def empty(cls, rows: int, window: int, vocabulary: int, device: torch.device, forced: bool, entropy: bool, penalty: bool) -> Outputs:
        rows += 1  # the last for slots that are not live
        lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        return cls(
            ids=torch.zeros(rows, window, dtype=torch.int32, device=device),
            logprobs=torch.zeros(rows, window, device=device),
            lengths=lengths,
            finished=torch.zeros(rows, dtype=torch.bool, device=device),
            forced=torch.zeros_like(lengths) if forced else lengths,
            entropies=torch.zeros(rows, window, device=device) if entropy else None,
            seen=torch.zeros(rows, vocabulary, dtype=torch.bool, device=device) if penalty else None,
            forbidden={},
        )

    def fits(self, rows: int, window: int, forced: bool, sampling: Sampling) -> bool:
        enough = self.ids.shape[0] > rows and self.ids.shape[1] >= window and (self.forced is not self.lengths) == forced
        return enough and (self.entropies is not None or not sampling.entropy) and (self.seen is not None or sampling.repetition_penalty == 1.0)

    def forbid(self, sampling: Sampling, eos: Tensor, vocabulary: int) -> None:
        """Prepare for the forbidden tokens of `sampling`; a captured step can only read them."""
        if forbids(sampling) and sampling.bad_token_ids not in self.forbidden:
            mask = torch.zeros(vocabulary, dtype=torch.uint8, device=eos.device)
            mask[eos] = kernels.END
            mask[list(sampling.bad_token_ids)] = kernels.NEVER
            self.forbidden[sampling.bad_token_ids] = mask

    def clear(self) -> None:
        for tensor in (self.logprobs, self.lengths, self.finished, self.forced, self.entropies, self.seen):
            if tensor is not None:
                tensor.zero_()


def draw_tokens(
    logits: Tensor,
    sampling: Sampling,
    rows: Tensor,
    keys: Tensor,
    numbers: Tensor,
    least: Tensor,
    eos: Tensor,
    out: Outputs,
    source: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(token [B], logprob [B]) of response token `numbers` [B] of `rows` [B]. logits: [B, V], or [m, V] and `source` [B] says whose are whose."""
    temperature, entropy = sampling.temperature if sampling.temperature > 0 else 1.0, None
    seen = out.seen if sampling.repetition_penalty != 1.0 else None
    if logits.device.type == "cuda":
        forbidden = out.forbidden[sampling.bad_token_ids] if forbids(sampling) else None
        shaping = None if plain(sampling) else kernels.Shaping(sampling, rows, least, forbidden, seen)
        token, logprob, entropy = kernels.sample(logits, temperature, sampling.temperature > 0, keys, numbers, source, shaping)
    else:
        logits = logits if source is None else logits[source]
        if not plain(sampling):
            logits, temperature = shape_logits(logits, sampling, numbers < least, eos, None if seen is None else seen[rows]), 1.0
            if sampling.entropy:
                logs = logits.log_softmax(-1)
                entropy = -(logs.exp() * logs.masked_fill(logs == -torch.inf, 0.0)).sum(-1)
        token, logprob = sample(logits, temperature, sampling.temperature > 0, keys, numbers)
    if sampling.entropy:
        assert out.entropies is not None and entropy is not None
        out.entropies[rows, numbers] = entropy
    if seen is not None:
        seen[rows, token] = True
    return token, logprob


def record(token: Tensor, logprob: Tensor, state: Slots, out: Outputs, eos: Tensor) -> None:
    """Write down what the first B slots sampled, and decide who goes on. The end token belongs to the response (trap 3)."""
    if token.device.type == "cuda":
        kernels.record(token, logprob, state, out, eos)
        return
    batch = len(token)
    alive = state.live[:batch].nonzero().squeeze(1)
    row, token, new = state.row[alive], token[alive], state.new[alive]
    stops = torch.isin(token, eos)
    if out.forced is not out.lengths:
        due = out.forced[row]
        token = torch.where((due > 0) & (due == new + 1), eos[0], token)
        stops = torch.where(due > 0, due == new + 1, stops)
    out.ids[row, new] = token.int()
    out.logprobs[row, new] = logprob[alive]
    out.lengths[row], out.finished[row] = new + 1, stops
    state.token[alive], state.new[alive] = token, new + 1
    state.length[alive] += 1
    state.live[alive] = ~stops & (new + 1 < state.limit[alive])


def batch_sizes(most: int) -> list[int]:
    """Batch sizes with a graph of their own, up to `most`: a step for more rows costs more, a graph too."""
    sizes = [1, 2, 4, 8, *range(16, 257, 16), *range(288, 513, 32), *range(576, 1025, 64), *range(1152, 4097, 128)]
    return [*(s for s in sizes if s < most), most]


class DecodeLoop:
    """Runs decode steps over the first slots. Captured graphs stay valid while cache, state and outputs keep their addresses."""

    def __init__(self, decoder: Decoder, cache: PagedCache, state: Slots, eos: Tensor, max_batch: int, max_context: int, graphs: bool):
        self.decoder, self.cache, self.state, self.eos, self.max_batch = decoder, cache, state, eos, max_batch
        self.max_context, self.device = max_context, cache.device
        self.slots = torch.arange(max_batch, device=self.device)
        self.workspace: kernels.AttentionWorkspace | None = None
        self.graphs = graphs and self.device.type == "cuda"
        self.sizes = batch_sizes(max_batch)
        self._captured: dict[tuple[int, Sampling], torch.cuda.CUDAGraph] = {}
        self._pool: tuple[int, int] | None = None
        if self.device.type == "cuda":
            # A stream of this loop alone: cuBLAS keeps a workspace for each, and a graph that dies takes that of its stream along (pytorch#193402).
            self._stream = torch.cuda.Stream()
            shape = cache.shape
            self.workspace = kernels.attention_workspace(self.sizes, decoder.heads, shape.kv_heads, shape.head_dim, max_context, self.device)

    def batch_for(self, used: int) -> int:
        """The batch that a step for `used` slots runs with."""
        return next(s for s in self.sizes if s >= used) if self.device.type == "cuda" else used

    def step(self, batch: int, sampling: Sampling, out: Outputs) -> None:
        """One token more for every live slot below `batch`."""
        if not self.graphs:
            self._eager(batch, sampling, out)
            return
        key = (batch, shape_of(sampling))
        if key not in self._captured:
            self.capture([batch], sampling, out)
        self._captured[key].replay()

    def _eager(self, batch: int, sampling: Sampling, out: Outputs) -> None:
        state = self.state
        length, live = state.length[:batch], state.live[:batch]
        self.cache.grow(length, live)
        splits = kernels.attention_splits(batch, self.cache.shape.kv_heads, self.max_context)
        step = DecodeStep(self.cache, self.slots[:batch], length, splits, self.workspace)
        logits = self.decoder.forward(state.token[:batch], length, step, self.slots[:batch])
        assert logits is not None
        row, new = state.row[:batch], state.new[:batch]
        if not plain(sampling):
            # What slots that are not live would note of their rows must hurt nobody: the row may be preempted, or live in another slot.
            row, new = torch.where(live, row, len(out.ids) - 1), torch.where(live, new, 0)
        token, logprob = draw_tokens(logits, sampling, row, state.key[:batch], new, state.least[:batch], self.eos, out)
        record(token, logprob, state, out, self.eos)

    def capture(self, batches: list[int], sampling: Sampling, out: Outputs, beat: Callable[[], None] = lambda: None) -> None:
        """Graphs for these batch sizes, the largest first, so that the smaller ones fit into its memory. No slot may change by it: the caller sees
        to it that none is live, or captures while they are (a warm-up step of dead slots changes nothing, a capture runs nothing)."""
        live = self.state.live.clone()
        self.state.live.zero_()
        for batch in sorted(batches, reverse=True):
            key = (batch, shape_of(sampling))
            if key in self._captured:
                continue
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._eager(batch, sampling, out)
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):  # others lock memory
                self._eager(batch, sampling, out)
            self._pool = self._pool or graph.pool()
            self._captured[key] = graph
            beat()
        self.state.live.copy_(live)

    def forget_graphs(self) -> None:
        """Before outputs of another address are used: the graphs hold the old one."""
        self._captured.clear()
        self._pool = None
