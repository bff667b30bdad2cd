"""The paged KV cache: a pool of pages, a table of pages per batch slot, and the attention that reads through it.

Pages are counted, so that the samples of one prompt share its full pages. Everything that decides which page is whose lives on the device: the
host never waits for it. Page 0 belongs to nobody; empty slots write there.
Layouts after vLLM's (Kwon et al. 2023, arXiv:2309.06180): pool [layer, k or v, page, token in page, kv head, head dim].
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.rollout import kernels

if torch.cuda.is_available():
    from torch.nn.attention.varlen import varlen_attn

    # Before 2.12 fewer key heads than query heads go without saying.
    GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """To the device, without waiting for what it is doing."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


CPU_ROWS = 4  # rows whose keys and values are gathered together on CPU: more do not fit into its cache


@dataclass(frozen=True)
class CacheShape:
    layers: int
    kv_heads: int
    head_dim: int

    def page_bytes(self, page_size: int, dtype: torch.dtype) -> int:
        return self.layers * 2 * page_size * self.kv_heads * self.head_dim * dtype.itemsize


class PagedCache:
    """`slots` batch slots over `pages` pages (page 0 included). One more slot, the last, holds the prefix of a group that is admitted in parts."""

    def __init__(self, shape: CacheShape, pool: Tensor, slots: int, max_context: int):
        """pool: [layers, 2, pages, page_size, kv_heads, head_dim], contents undefined."""
        device = pool.device
        self.shape, self.pool, self.device = shape, pool, device
        self.pages, self.page_size = pool.shape[2], pool.shape[3]
        self.holder = slots
        self.holder_index = torch.tensor([slots], device=device)
        width = -(-max_context // self.page_size)
        self.table = torch.zeros(slots + 1, width, dtype=torch.int32, device=device)
        self.held = torch.zeros(slots + 1, dtype=torch.int32, device=device)  # pages in each slot's row of the table
        self.references = torch.zeros(self.pages, dtype=torch.int32, device=device)
        self.free = torch.zeros(self.pages, dtype=torch.int32, device=device)  # the first `free_count` entries are free pages
        self.free_count = torch.zeros(1, dtype=torch.int32, device=device)
        self.reset()

    def reset(self) -> None:
        self.table.zero_()
        self.held.zero_()
        self.references.zero_()
        self.references[0] = 1
        self.pool[:, :, 0].zero_()  # empty slots read there, and fresh memory may hold anything
        self._recount()

    def _recount(self) -> None:
        """The free list from the reference counts, lowest page first on top."""
        taken = self.references > 0
        self.free.copy_(torch.argsort(taken.to(torch.int8), stable=True))
        self.free_count.copy_((~taken).sum().reshape(1))

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def take(self, slots: Sequence[int], places: np.ndarray, counts: np.ndarray) -> Tensor:
        """Give new pages to `slots`. places: [len(slots), width], entry = 1-based number of the new page that stands there, 0 = none;
        counts: [new pages], how many slots hold each. Returns the pages by number. The caller knows that enough are free."""
        where, entries = upload(np.asarray(slots), self.device), upload(places, self.device)
        index = (self.free_count - 1).long() - torch.arange(len(counts), device=self.device)
        new = self.free[index]
        self.free_count -= len(counts)
        self.references.index_copy_(0, new.long(), upload(counts.astype(np.int32), self.device))
        numbered = torch.cat([torch.zeros(1, dtype=torch.int32, device=self.device), new])
        self.table[where, : places.shape[1]] = numbered[entries]
        self.held[where] = (entries > 0).sum(1, dtype=torch.int32)
        return numbered

    def share(self, source: int, slots: Sequence[int], full: int, partial: bool) -> None:
        """Slots that continue what slot `source` holds: its `full` first pages shared, a partly filled one after them copied to a new page."""
        where = upload(np.asarray(slots), self.device)
        self.table[where, :full] = self.table[source, :full].clone()
        self.references.index_add_(0, self.table[source, :full].long(), torch.full((full,), len(slots), dtype=torch.int32, device=self.device))
        self.held[where] = full
        if partial:
            index = (self.free_count - 1).long() - torch.arange(len(slots), device=self.device)
            new = self.free[index]
            self.free_count -= len(slots)
            self.references.index_fill_(0, new.long(), 1)
            self.table[where, full] = new
            self.held[where] += 1
            self.copy_pages(self.table[source, full].expand(len(slots)).long(), new.long())

    def copy_pages(self, source: Tensor, target: Tensor) -> None:
        """Copy on write: contents of pages `source` to pages `target`, in every layer."""
        for part in range(0, len(source), 64):
            self.pool[:, :, target[part : part + 64]] = self.pool[:, :, source[part : part + 64]]

    def release(self, slots: Tensor) -> None:
        """Drop the pages of `slots` [n] int64 on the device; those that nobody else holds are free again."""
        entries = self.table[slots]
        held = torch.arange(entries.shape[1], device=self.device) < self.held[slots][:, None]
        self.references.index_add_(0, torch.where(held, entries, 0).flatten().long(), -held.flatten().to(torch.int32))
        self.held[slots] = 0
        self.table[slots] = 0
        self._recount()

    def grow(self, lengths: Tensor, live: Tensor) -> None:
        """A page for every live slot [B] whose next token, at position `lengths`, begins one. No host."""
        batch = len(lengths)
        if self.device.type == "cuda":
            kernels.grow_pages(lengths, live, self.table, self.held, self.references, self.free, self.free_count, self.page_size)
            return
        needs = (live & (lengths == self.held[:batch] * self.page_size)).nonzero().squeeze(1)
        if len(needs):
            index = self.free_count - 1 - torch.arange(len(needs))
            new = self.free[index]
            self.free_count -= len(needs)
            self.references.index_fill_(0, new.long(), 1)
            self.table[needs, self.held[needs].long()] = new
            self.held[needs] += 1


class Step(ABC):
    """What attention needs to know of one forward over n tokens. The models call `write`, then `attend`, once per layer."""

    def __init__(self, cache: PagedCache, slots: Tensor, positions: Tensor):
        """slots, positions: [n] int64 batch slot and position of each token."""
        self.cache, self.slots, self.positions = cache, slots, positions

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v: [n, kv_heads, head_dim]"""
        if self.cache.device.type == "cuda":
            kernels.write_cache(k, v, self.cache.pool[layer], self.slots, self.positions, self.cache.table)
            return
        page = self.cache.page_size
        target = self.cache.table[self.slots, self.positions // page].long() * page + self.positions % page
        self.cache.pool[layer, 0].view(-1, *k.shape[1:])[target] = k
        self.cache.pool[layer, 1].view(-1, *v.shape[1:])[target] = v

    @abstractmethod
    def attend(self, layer: int, q: Tensor, scale: float, window: int | None) -> Tensor:
        """q: [n, heads, head_dim] -> the same: causal over what each token's sequence has in the cache; a window counts the token itself."""


class DecodeStep(Step):
    """One token in each of the first B slots. positions: the live buffer of lengths, read anew in every replay of a captured graph."""

    def __init__(self, cache: PagedCache, slots: Tensor, positions: Tensor, splits: int = 1, workspace: kernels.AttentionWorkspace | None = None):
        super().__init__(cache, slots, positions)
        self.splits, self.workspace = splits, workspace
        if cache.device.type == "cpu":  # what all layers share: the rows by length, a few at a time so that what is gathered stays in the cache
            order = positions.argsort()
            self._back = order.argsort()
            counts = positions[order] // cache.page_size + 1
            self._parts = [
                (rows, cache.table[rows, : int(pages[-1])].flatten().long())
                for rows, pages in zip(order.split(CPU_ROWS), counts.split(CPU_ROWS), strict=True)
            ]
            self._masks: dict[int | None, list[Tensor]] = {}  # by window

    def _mask(self, window: int | None, dtype: torch.dtype) -> list[Tensor]:
        """To be added to the scores of each part: [rows, 1, 1, context]."""
        if window not in self._masks:
            self._masks[window] = []
            for rows, pages in self._parts:
                column, position = torch.arange(len(pages) // len(rows) * self.cache.page_size), self.positions[rows, None]
                unseen = column > position
                if window is not None:
                    unseen |= column <= position - window
                self._masks[window].append(torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, -torch.inf)[:, None, None])
        return self._masks[window]

    def attend(self, layer: int, q: Tensor, scale: float, window: int | None) -> Tensor:
        """q: [B, heads, head_dim] -> the same"""
        if self.workspace is not None:
            heads = q.shape[1]
            return self._kernel(layer, q.reshape(len(q), -1), heads, scale, window, None)
        # The query heads that share a key head stand as its queries, so that it is read once.
        kv_heads, dim = self.cache.shape.kv_heads, q.shape[2]
        grouped, done = q.reshape(len(q), kv_heads, -1, dim), []
        for (rows, pages), mask in zip(self._parts, self._mask(window, q.dtype), strict=True):
            k, v = (part.index_select(0, pages).view(len(rows), -1, kv_heads, dim).transpose(1, 2) for part in self.cache.pool[layer])
            done.append(F.scaled_dot_product_attention(grouped[rows], k, v, mask.expand(-1, -1, grouped.shape[2], -1), scale=scale))
        return torch.cat(done)[self._back].reshape(q.shape)

    def rotate_and_attend(
        self, layer: int, qkv: Tensor, heads: int, scale: float, window: int | None, rotation: kernels.Rotation, rows: int
    ) -> Tensor:  # fmt: skip
        """On GPU: qkv [>= B, (heads + 2 kv_heads) * D] as projected -> [max(B, rows), heads, D], with k and v put into the cache on the way."""
        return self._kernel(layer, qkv, heads, scale, window, rotation, rows)

    def _kernel(
        self, layer: int, q: Tensor, heads: int, scale: float, window: int | None, rotation: kernels.Rotation | None, rows: int = 0
    ) -> Tensor:
        assert self.workspace is not None
        return kernels.paged_attention(
            q, heads, self.cache.pool[layer], self.cache.table, self.positions, scale, window, self.splits, self.workspace, rotation, rows
        )  # fmt: skip


@dataclass(frozen=True)
class Segment:
    """Tokens [start, end) of what a slot is to hold; what comes before `start` is in the cache already."""

    slot: int
    start: int
    end: int


def _ranges(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """start[0], start[0] + 1, ... for length[0] numbers, then the same of the next."""
    return np.arange(length.sum()) - (length.cumsum() - length - start).repeat(length)


class PrefillStep(Step):
    """Stretches of several sequences, one after the other in the packed batch."""

    def __init__(self, cache: PagedCache, segments: list[Segment]):
        device, page = cache.device, cache.page_size
        slot, start, end = np.array([(s.slot, s.start, s.end) for s in segments], dtype=np.int64).T
        lengths = end - start
        super().__init__(cache, upload(slot.repeat(lengths), device), upload(_ranges(start, lengths), device))
        self.segments, self.last = segments, upload(lengths.cumsum() - 1, device)
        self._continues = bool(start.any())
        self._context, self._longest = int(end.max()), int(lengths.max())
        # What the flash kernel takes; the rest goes sequence by sequence.
        self._flash = device.type == "cuda" and cache.pool.dtype != torch.float32 and cache.shape.head_dim % 8 == 0 and cache.shape.head_dim <= 256
        if self._flash:
            self._queries, self._keys = (upload(np.concatenate([[0], n.cumsum()]).astype(np.int32), device) for n in (lengths, end))
            if self._continues:  # cache index of every token of every context
                owner, position = upload(slot.repeat(end), device), upload(_ranges(np.zeros_like(end), end), device)
                self._gather = cache.table[owner, position // page].long() * page + position % page
        self._new: tuple[Tensor, Tensor] | None = None

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        super().write(layer, k, v)
        self.written(k, v)

    def written(self, k: Tensor, v: Tensor) -> None:
        """The model has put this layer's k and v into the cache itself."""
        self._new = (k, v)

    def attend(self, layer: int, q: Tensor, scale: float, window: int | None) -> Tensor:
        """q: [n, heads, head_dim] -> the same"""
        pool = self.cache.pool[layer]
        if self._flash:
            assert self._new is not None
            k, v = (part.flatten(0, 1)[self._gather] for part in pool) if self._continues else self._new
            left = -1 if window is None else window - 1
            return varlen_attn(q, k, v, self._queries, self._keys, self._longest, self._context, window_size=(left, 0), scale=scale, **GROUPED)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        begin = 0
        for s in self.segments:
            n = s.end - s.start
            used = self.cache.table[s.slot, : self.cache.pages_for(s.end)].long()
            k, v = (part[used].flatten(0, 1)[: s.end].transpose(0, 1)[None] for part in pool)
            mask = None
            if s.start or window is not None:
                query, key = torch.arange(s.start, s.end, device=q.device)[:, None], torch.arange(s.end, device=q.device)
                mask = (key <= query) & (True if window is None else key > query - window)
            part = F.scaled_dot_product_attention(
                q[begin : begin + n].transpose(0, 1)[None], k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True
            )
            out[begin : begin + n] = part[0].transpose(0, 1)
            begin += n
        return out
