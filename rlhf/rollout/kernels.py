"""The GPU kernels of the rollout, in Triton. Each has its plain torch counterpart in `paged`, `decoder` or `sampler`, which runs on CPU.

They round where transformers' own modules round (norms, rotary embedding, activation) and walk as flash attention does, so that a rollout's logprobs
are those of the training forward but for the order of some sums. The module imports without Triton; calling then fails.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.ops.fused import UNFUSED, _early, _rms, _rotate, tl, triton
from rlhf.ops.fused import add_norm as add_norm
from rlhf.ops.fused import silu_mul as silu_mul
from rlhf.rollout.sampler import SAMPLE_BLOCK

# ---------------------------------------------------------------------------------------------------------------- decoder


@triton.jit(do_not_specialize=["stride", "width"])
def _rope_and_cache(
    QKV, stride, COS, SIN, POSITION, SLOT, TABLE, width, KEYS, VALUES, QNORM, KNORM, eps,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, HALF)
    inside = i < D // 2
    source = QKV + token * stride + head * D
    low, high = tl.load(source + i, mask=inside, other=0.0), tl.load(source + D // 2 + i, mask=inside, other=0.0)
    position = tl.load(POSITION + token)
    dtype = QKV.dtype.element_ty
    if head < HQ + HK:
        if NORM:
            weight = QNORM if head < HQ else KNORM
            a, b = low.to(tl.float32), high.to(tl.float32)
            rstd = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / D + eps)
            wa, wb = tl.load(weight + i, mask=inside, other=0.0), tl.load(weight + D // 2 + i, mask=inside, other=0.0)
            low = ((a * rstd).to(dtype).to(tl.float32) * wa.to(tl.float32)).to(dtype)
            high = ((b * rstd).to(dtype).to(tl.float32) * wb.to(tl.float32)).to(dtype)
        cos = tl.load(COS + position * (D // 2) + i, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(SIN + position * (D // 2) + i, mask=inside, other=0.0).to(tl.float32)
        a, b = low.to(tl.float32), high.to(tl.float32)
        # Products rounded one by one, as the training model's elementwise operations do.
        low = ((a * cos).to(dtype).to(tl.float32) - (b * sin).to(dtype).to(tl.float32)).to(dtype)
        high = ((b * cos).to(dtype).to(tl.float32) + (a * sin).to(dtype).to(tl.float32)).to(dtype)
        tl.store(source + i, low, mask=inside)
        tl.store(source + D // 2 + i, high, mask=inside)
    if head >= HQ:
        slot = tl.load(SLOT + token)
        page = tl.load(TABLE + slot * width + position // PAGE).to(tl.int64)
        pool = KEYS if head < HQ + HK else VALUES
        target = pool + ((page * PAGE + position % PAGE) * HK + (head - HQ) % HK) * D
        tl.store(target + i, low, mask=inside)
        tl.store(target + D // 2 + i, high, mask=inside)


def rope_and_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, table: Tensor, pool: Tensor,
    heads: int, kv_heads: int, q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
) -> None:  # fmt: skip
    """Normalise (where the model does) and rotate q and k of qkv [n, (heads + 2 HK) * D] in place; write k and v to pool [2, pages, page, HK, D].

    cos, sin: [positions, D / 2]."""
    n, dim = len(qkv), qkv.shape[1] // (heads + 2 * kv_heads)
    assert qkv.stride(1) == 1
    _rope_and_cache[(n, heads + 2 * kv_heads)](
        qkv, qkv.stride(0), cos, sin, positions, slots, table, table.stride(0), pool[0], pool[1],
        cos if q_norm is None else q_norm, cos if k_norm is None else k_norm, eps,
        heads, kv_heads, dim, triton.next_power_of_2(dim // 2), pool.shape[2], q_norm is not None, num_warps=1, **UNFUSED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["ks", "vs", "width"])
def _write_cache(K, ks, V, vs, KEYS, VALUES, SLOT, POSITION, TABLE, width, W: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    position = tl.load(POSITION + token)
    page = tl.load(TABLE + tl.load(SLOT + token) * width + position // PAGE).to(tl.int64)
    target = (page * PAGE + position % PAGE) * W + i
    tl.store(KEYS + target, tl.load(K + token * ks + i, mask=i < W), mask=i < W)
    tl.store(VALUES + target, tl.load(V + token * vs + i, mask=i < W), mask=i < W)


def write_cache(k: Tensor, v: Tensor, pool: Tensor, slots: Tensor, positions: Tensor, table: Tensor) -> None:
    """k, v [n, HK, D] into pool [2, pages, page, HK, D] at each token's place."""
    n, width = len(k), k.shape[1] * k.shape[2]
    k, v = k.reshape(n, width), v.reshape(n, width)
    _write_cache[(n,)](
        k,
        k.stride(0),
        v,
        v.stride(0),
        pool[0],
        pool[1],
        slots,
        positions,
        table,
        table.stride(0),
        width,
        triton.next_power_of_2(width),
        pool.shape[2],
    )


# -------------------------------------------------------------------------------------------------------------- attention

_LOG2E = 1.4426950408889634  # scores are scaled by it, too, so that powers of two will do; rounded to float32 once, as torch's flash attention does
SPLIT_TOKENS = 512  # least context of a program; up to it attention is, bit for bit, the training forward's flash attention
ATTENTION_WARPS = 1  # with more, a block's columns would be added up in another order than flash attention's
ATTENTION_STAGES = 2


def attention_block(dim: int) -> int:
    """Keys in one block: as many as flash attention takes on this hardware, because probabilities are rounded against the maximum so far."""
    return 128 if dim <= 64 else 64


@dataclass
class AttentionWorkspace:
    """Partial results of split contexts; one for the whole engine, as layers and batches follow each other."""

    partial: Tensor  # [rows * splits * heads, D] float32
    statistics: Tensor  # [rows * splits * heads, 2] float32: maximum, sum
    arrived: Tensor  # [rows * kv_heads] int32, zero between calls


def attention_splits(batch: int, kv_heads: int, max_context: int, processors: int = 132) -> int:
    """Most programs that share one context: enough to fill the device with few rows, and to even out long ones among many."""
    return max(1, min(-(-max_context // SPLIT_TOKENS), 32, max(8, -(-4 * processors // (batch * kv_heads)))))


def attention_workspace(batches: list[int], heads: int, kv_heads: int, dim: int, max_context: int, device: torch.device) -> AttentionWorkspace:
    rows = max(b * attention_splits(b, kv_heads, max_context) for b in batches) * heads
    return AttentionWorkspace(
        torch.empty(rows, dim, device=device),
        torch.empty(rows, 2, device=device),
        torch.zeros(max(batches) * kv_heads, dtype=torch.int32, device=device),
    )


@triton.jit(do_not_specialize=["q_stride", "width", "window", "splits"])
def _paged_attention(
    Q, q_stride, KEYS, VALUES, TABLE, width, POSITION, OUT, PARTIAL, STATISTICS, ARRIVED, COS, SIN, QNORM, KNORM, factor, window, splits, eps,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
    PAGE: tl.constexpr, BN: tl.constexpr, LEAST: tl.constexpr, WINDOW: tl.constexpr, ROTATE: tl.constexpr, NORM: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.program_id(1).to(tl.int64), tl.program_id(0), tl.program_id(2)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    context = tl.load(POSITION + row).to(tl.int32) + 1
    first = 0
    if WINDOW:
        first = tl.maximum(context - window, 0)
    begin = first // BN * BN
    span = tl.maximum(tl.cdiv(tl.cdiv(context - begin, splits), BN) * BN, LEAST)
    parts = tl.cdiv(context - begin, span)
    if split < parts:
        g, d, i, j = tl.arange(0, GP), tl.arange(0, DP), tl.arange(0, HALF), tl.arange(0, BN)
        inside = i < D // 2
        dtype = Q.dtype.element_ty
        source = Q + row * q_stride + (head * G + g)[:, None] * D + i[None, :]
        wanted = (g < G)[:, None] & inside[None, :]
        low, high = tl.load(source, mask=wanted, other=0.0), tl.load(source + D // 2, mask=wanted, other=0.0)
        if ROTATE:
            place = (context - 1).to(tl.int64) * (D // 2) + i
            cos = tl.load(COS + place, mask=inside, other=0.0).to(tl.float32)[None, :]
            sin = tl.load(SIN + place, mask=inside, other=0.0).to(tl.float32)[None, :]
            if NORM:
                low, high = _rms(low, high, QNORM, i, inside, D, eps, dtype)
            low, high = _rotate(low, high, cos, sin, dtype)
            if split == parts - 1:  # this program reads the new token: it puts it into the cache first
                one = tl.arange(0, 1)
                k_at = Q + row * q_stride + (HQ + head + one)[:, None] * D + i[None, :]
                k_low, k_high = tl.load(k_at, mask=inside[None, :], other=0.0), tl.load(k_at + D // 2, mask=inside[None, :], other=0.0)
                if NORM:
                    k_low, k_high = _rms(k_low, k_high, KNORM, i, inside, D, eps, dtype)
                k_low, k_high = _rotate(k_low, k_high, cos, sin, dtype)
                v_new = tl.load(Q + row * q_stride + (HQ + HK + head) * D + d, mask=d < D, other=0.0)
                new_page = tl.load(TABLE + row * width + (context - 1) // PAGE).to(tl.int64)
                target = ((new_page * PAGE + (context - 1) % PAGE) * HK + head) * D
                tl.store(KEYS + target + one[:, None] + i[None, :], k_low, mask=inside[None, :])
                tl.store(KEYS + target + D // 2 + one[:, None] + i[None, :], k_high, mask=inside[None, :])
                tl.store(VALUES + target + d, v_new, mask=d < D)
                tl.debug_barrier()
        top = tl.full([GP], -1e30, tl.float32)
        total = tl.zeros([GP, 4], tl.float32)
        acc = tl.zeros([GP, DP], tl.float32)
        start_at = begin + split * span
        end_at = tl.minimum(start_at + span, context)
        blocks = tl.cdiv(end_at - start_at, BN)
        # From the end to the beginning, as flash attention does in the training forward: probabilities are rounded against the same running maximum.
        for step in range(blocks):
            at = start_at + (blocks - 1 - step) * BN + j
            if PAGE % BN == 0:  # a block lies in one page
                page = tl.load(TABLE + row * width + (start_at + (blocks - 1 - step) * BN) // PAGE).to(tl.int64)
            elif BN == 2 * PAGE:
                begins = (start_at + (blocks - 1 - step) * BN) // PAGE
                second = tl.load(TABLE + row * width + begins + 1, mask=(begins + 1) * PAGE < end_at, other=0)
                page = tl.where(j < PAGE, tl.load(TABLE + row * width + begins), second).to(tl.int64)
            else:
                page = tl.load(TABLE + row * width + at // PAGE, mask=at < end_at, other=0).to(tl.int64)
            where = (page * PAGE + at % PAGE) * (HK * D) + head * D
            seen = at < end_at
            if WINDOW:
                seen = seen & (at >= first)
            k_source = KEYS + where[:, None] + i[None, :]
            k_low = tl.load(k_source, mask=seen[:, None] & inside[None, :], other=0.0)
            k_high = tl.load(k_source + D // 2, mask=seen[:, None] & inside[None, :], other=0.0)
            x = tl.dot(high, tl.trans(k_high), tl.dot(low, tl.trans(k_low), input_precision="ieee"), input_precision="ieee")
            x = tl.where(seen[None, :], x, -1e30)
            larger = tl.maximum(top, tl.max(x, 1))
            p = tl.exp2(x * factor - (larger * factor)[:, None])  # two roundings, as torch's flash attention has them
            shrink = tl.exp2((top - larger) * factor)
            # Flash attention adds up probabilities in four sums, as its threads hold them, one after the other on top of what was there. So must this
            # be: a warp has a block's columns where tensor cores leave them, and reduces what lies in one thread in order.
            column = tl.reshape(tl.permute(tl.reshape(p, [GP, BN // 8, 4, 2]), [0, 2, 1, 3]), [GP, 4, BN // 4])
            carried = tl.broadcast_to(total[:, :, None], column.shape)
            continued = tl.fma(carried, tl.broadcast_to(shrink[:, None, None], column.shape), column)
            total = tl.sum(tl.where(tl.arange(0, BN // 4)[None, None, :] == 0, continued, column), 2)
            v = tl.load(VALUES + where[:, None] + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            top = larger
        first_two, last_two = tl.split(tl.permute(tl.reshape(total, [GP, 2, 2]), [0, 2, 1]))
        even, odd = tl.split(first_two + last_two)
        mass = even + odd
        heads = head * G + g
        out = OUT + row * HQ * D + heads[:, None] * D + d[None, :]
        shown = (g < G)[:, None] & (d < D)[None, :]
        if parts == 1:
            tl.store(out, (acc * tl.math.div_rn(1.0, mass)[:, None]).to(OUT.dtype.element_ty), mask=shown)
        else:
            piece = (row * splits + split) * HQ + heads
            tl.store(PARTIAL + piece[:, None] * D + d[None, :], acc, mask=shown)
            tl.store(STATISTICS + piece * 2, top, mask=g < G)
            tl.store(STATISTICS + piece * 2 + 1, mass, mask=g < G)
            tl.debug_barrier()  # all of this program's stores, before it says that it is done
            before = tl.atomic_add(ARRIVED + row * HK + head, 1, sem="acq_rel")
            if before == parts - 1:  # the last to arrive puts the parts together, in their order
                tl.debug_barrier()
                top = tl.full([GP], -1e30, tl.float32)
                mass = tl.zeros([GP], tl.float32)
                acc = tl.zeros([GP, DP], tl.float32)
                for other in range(parts):
                    piece = (row * splits + other) * HQ + heads
                    its_top = tl.load(STATISTICS + piece * 2, mask=g < G, other=-1e30, cache_modifier=".cg")
                    its_mass = tl.load(STATISTICS + piece * 2 + 1, mask=g < G, other=0.0, cache_modifier=".cg")
                    its = tl.load(PARTIAL + piece[:, None] * D + d[None, :], mask=shown, other=0.0, cache_modifier=".cg")
                    larger = tl.maximum(top, its_top)
                    mine, theirs = tl.exp2((top - larger) * factor), tl.exp2((its_top - larger) * factor)
                    acc = acc * mine[:, None] + its * theirs[:, None]
                    mass = mass * mine + its_mass * theirs
                    top = larger
                tl.store(out, (acc * tl.math.div_rn(1.0, mass)[:, None]).to(OUT.dtype.element_ty), mask=shown)
                tl.store(ARRIVED + row * HK + head, 0)


@dataclass
class Rotation:
    """What turns the new token's q and k: cos, sin [positions, D / 2]; weights [D] of the heads' norms where the model has them."""

    cos: Tensor
    sin: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float


def paged_attention(
    q: Tensor, heads: int, pool: Tensor, table: Tensor, positions: Tensor, scale: float, window: int | None, splits: int,
    workspace: AttentionWorkspace, rotation: Rotation | None = None, rows: int = 0,
) -> Tensor:  # fmt: skip
    """One query per row over the pages of rows 0..B-1 of `table`, tokens 0..positions[b] -> [max(B, rows), heads, D]. pool: [2, pages, page, HK, D].

    q: [>= B, heads * D] with k and v in the cache already; or, with `rotation`, q|k|v as projected [>= B, (heads + 2 HK) * D], and k and v are
    rotated and written here. Long contexts are split and merged by the last program to arrive (FlashDecoding, Dao et al. 2023)."""
    batch = len(positions)
    kv_heads, page, dim = pool.shape[3], pool.shape[2], pool.shape[4]
    group = heads // kv_heads
    out = torch.empty(max(batch, rows), heads, dim, dtype=q.dtype, device=q.device)
    r = rotation or Rotation(q, q, None, None, 0.0)
    _paged_attention[(kv_heads, batch, splits)](
        q, q.stride(0), pool[0], pool[1], table, table.stride(0), positions, out,
        workspace.partial, workspace.statistics, workspace.arrived, r.cos, r.sin,
        q if r.q_norm is None else r.q_norm, q if r.k_norm is None else r.k_norm,
        _LOG2E * float(np.float32(scale)), window or 0, splits, r.eps,
        heads, kv_heads, dim, triton.next_power_of_2(dim), max(16, triton.next_power_of_2(dim // 2)), group, max(16, triton.next_power_of_2(group)),
        page, attention_block(dim), SPLIT_TOKENS, window is not None, rotation is not None, r.q_norm is not None,
        num_warps=ATTENTION_WARPS, num_stages=ATTENTION_STAGES, **UNFUSED, **_early(),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["batch", "width"])
def _grow_pages(LENGTH, LIVE, TABLE, width, HELD, REFERENCES, FREE, FREE_COUNT, batch, PAGE: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        tl.extra.cuda.gdc_wait()
    slot = tl.arange(0, BLOCK)
    inside = slot < batch
    held = tl.load(HELD + slot, mask=inside, other=0)
    needs = inside & (tl.load(LIVE + slot, mask=inside, other=0) != 0) & (tl.load(LENGTH + slot, mask=inside, other=0) == held * PAGE)
    rank = tl.cumsum(needs.to(tl.int32), 0)
    count = tl.load(FREE_COUNT)
    page = tl.load(FREE + count - rank, mask=needs, other=0)
    tl.store(TABLE + slot * width + held, page, mask=needs)
    tl.store(REFERENCES + page, 1, mask=needs)
    tl.store(HELD + slot, held + 1, mask=needs)
    tl.debug_barrier()
    tl.store(FREE_COUNT, count - tl.sum(needs.to(tl.int32), 0))


def grow_pages(
    lengths: Tensor, live: Tensor, table: Tensor, held: Tensor, references: Tensor, free: Tensor, free_count: Tensor, page_size: int
) -> None:
    """`PagedCache.grow` in one program."""
    block = triton.next_power_of_2(len(lengths))
    _grow_pages[(1,)](
        lengths,
        live,
        table,
        table.stride(0),
        held,
        references,
        free,
        free_count,
        len(lengths),
        page_size,
        block,
        num_warps=min(16, max(1, block // 128)),
        **_early(),
    )


# ---------------------------------------------------------------------------------------------------------------- sampler


@triton.jit
def _mix32(x):
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    x ^= x >> 16
    return x


@triton.jit
def _gumbel(index, low, high):
    """`sampler.gumbel_noise` of the tokens or blocks `index` (uint32), from the two halves of the row's mixed key."""
    bits = _mix32(_mix32((index * 0x9E3779B1) ^ low) + high)
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1 - 5.9604644775390625e-08)
    # -log(1 - u), precise where u is small: there the deciding values come from.
    small = u * (1 + u * (0.5 + u * (0.3333333333 + u * (0.25 + u * 0.2))))
    return -tl.log(tl.where(u < 0.015625, small, -tl.log(1 - u)))


@triton.jit
def _mixed_key(KEY, NUMBER, row):
    mixed = tl.load(KEY + row) ^ (tl.load(NUMBER + row).to(tl.int64) * -7046029254386353131)
    mixed = mixed ^ ((mixed >> 32) & 0xFFFFFFFF)
    mixed = mixed * -2960836687051489901
    mixed = mixed ^ ((mixed >> 32) & 0xFFFFFFFF)
    mixed = mixed * -2960836687051489901
    return (mixed & 0xFFFFFFFF).to(tl.uint32), ((mixed >> 32) & 0xFFFFFFFF).to(tl.uint32)


NEVER, END = 1, 2  # in `Shaping.forbidden`: a token that is never drawn, and one that may not come too early


@dataclass
class Shaping:
    """What of `sampler.shape_logits` a step needs: each tensor is None where it is not asked for."""

    sampling: Any  # types.Sampling
    rows: Tensor  # [B] int64: row of `seen`
    least: Tensor  # [B] int64: no end token before so many
    forbidden: Tensor | None  # [V] uint8: NEVER, END
    seen: Tensor | None  # [R, V] bool: tokens under the repetition penalty


@triton.jit
def _row(
    LOGITS, stride, SOURCE, ROW, NUMBER, LEAST, SEEN, row, vocabulary,
    MAPPED: tl.constexpr, FORBIDS: tl.constexpr, PENALISES: tl.constexpr,
):  # fmt: skip
    """(its logits, its tokens under the penalty, whether it may not end yet)"""
    source = row.to(tl.int64)
    if MAPPED:
        source = tl.load(SOURCE + row).to(tl.int64)
    seen = SEEN
    if PENALISES:
        seen = SEEN + tl.load(ROW + row) * vocabulary
    early = row < 0
    if FORBIDS:
        early = tl.load(NUMBER + row) < tl.load(LEAST + row)
    return LOGITS + source * stride, seen, early


@triton.jit
def _shaped(
    LOGITS, FORBIDDEN, SEEN, token, vocabulary, early, penalty, temperature,
    TEMPERED: tl.constexpr, FORBIDS: tl.constexpr, PENALISES: tl.constexpr,
):  # fmt: skip
    """float32 logits of `token` after penalty, forbidden tokens and temperature. LOGITS and SEEN begin at the row."""
    inside = token < vocabulary
    x = tl.load(LOGITS + token, mask=inside, other=-float("inf")).to(tl.float32)
    if PENALISES:
        seen = tl.load(SEEN + token, mask=inside, other=0) != 0
        x = tl.where(seen, tl.where(x > 0, x / penalty, x * penalty), x)
    if FORBIDS:
        kind = tl.load(FORBIDDEN + token, mask=inside, other=0)
        x = tl.where((kind == 1) | ((kind == 2) & early), -float("inf"), x)
    if TEMPERED:
        x = x / temperature
    return x


@triton.jit
def _ordered(x):
    """float32 <-> int32 of the same order."""
    return x ^ ((x >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["top_k"])
def _thresholds(
    LOGITS, stride, SOURCE, ROW, NUMBER, LEAST, FORBIDDEN, SEEN, THRESHOLD, temperature, vocabulary, penalty, top_k, top_p, log_min_p,
    MAPPED: tl.constexpr, TEMPERED: tl.constexpr, FORBIDS: tl.constexpr, PENALISES: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    logits, seen, early = _row(LOGITS, stride, SOURCE, ROW, NUMBER, LEAST, SEEN, row, vocabulary, MAPPED, FORBIDS, PENALISES)
    i = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    for begin in range(0, vocabulary, BLOCK):
        x = _shaped(logits, FORBIDDEN, seen, begin + i, vocabulary, early, penalty, temperature, TEMPERED, FORBIDS, PENALISES)
        largest = tl.maximum(largest, x)
    most = tl.max(largest, 0)
    threshold = -float("inf")
    for kind in tl.static_range(2):  # the k largest; then the least set of the largest whose mass is top_p of what is left
        if (kind == 0 and TOP_K) or (kind == 1 and TOP_P):
            target = top_k.to(tl.float32)
            if kind == 1:
                masses = tl.zeros([BLOCK], tl.float32)
                for begin in range(0, vocabulary, BLOCK):
                    x = _shaped(logits, FORBIDDEN, seen, begin + i, vocabulary, early, penalty, temperature, TEMPERED, FORBIDS, PENALISES)
                    masses += tl.where(x >= threshold, tl.exp(x - most), 0.0)
                target = tl.sum(masses, 0) * top_p
            # The least float with less than the target above it, by bisection over the floats in their order.
            low = _ordered(tl.cast(threshold, tl.int32, bitcast=True)).to(tl.int64) - 1
            high = _ordered(tl.cast(most, tl.int32, bitcast=True)).to(tl.int64)
            while high - low > 1:
                middle = (low + high) // 2
                t = tl.cast(_ordered(middle.to(tl.int32)), tl.float32, bitcast=True)
                above = tl.zeros([BLOCK], tl.float32)
                for begin in range(0, vocabulary, BLOCK):
                    x = _shaped(logits, FORBIDDEN, seen, begin + i, vocabulary, early, penalty, temperature, TEMPERED, FORBIDS, PENALISES)
                    weight = tl.exp(x - most) if kind == 1 else tl.full([BLOCK], 1.0, tl.float32)
                    above += tl.where(x > t, weight, 0.0)
                if tl.sum(above, 0) < target:
                    high = middle
                else:
                    low = middle
            threshold = tl.cast(_ordered(high.to(tl.int32)), tl.float32, bitcast=True)
    tl.store(THRESHOLD + row, tl.maximum(threshold, most + log_min_p))


@triton.jit(do_not_specialize=["parts"])
def _sample_parts(
    LOGITS, stride, SOURCE, KEY, NUMBER, BEST, WHERE, TOP, SUM, MEAN, temperature, vocabulary, parts,
    ROW, LEAST, FORBIDDEN, SEEN, THRESHOLD, penalty,
    BLOCKS: tl.constexpr, WIDTH: tl.constexpr, NOISE: tl.constexpr, TEMPERED: tl.constexpr, MAPPED: tl.constexpr,
    FORBIDS: tl.constexpr, PENALISES: tl.constexpr, CUTS: tl.constexpr, ENTROPY: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(1), tl.program_id(0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    logits, seen, early = _row(LOGITS, stride, SOURCE, ROW, NUMBER, LEAST, SEEN, row, vocabulary, MAPPED, FORBIDS, PENALISES)
    block = part * BLOCKS + tl.arange(0, BLOCKS)
    token = block[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    x = _shaped(logits, FORBIDDEN, seen, token, vocabulary, early, penalty, temperature, TEMPERED, FORBIDS, PENALISES)
    if CUTS:
        x = tl.where(x >= tl.load(THRESHOLD + row), x, -float("inf"))
    most = tl.maximum(tl.max(x, 1), -1e38)  # of each block; a block without any allowed token must not give inf - inf
    p = tl.exp(x - most[:, None])
    total = tl.sum(p, 1)
    top = tl.max(most, 0)
    out = row * parts + part
    # Logits may be NaN where nobody is (an empty slot), and should a model diverge: nothing may be read out of bounds then.
    tl.store(TOP + out, top)
    tl.store(SUM + out, tl.sum(total * tl.exp(most - top), 0))
    if ENTROPY:
        weighted = tl.sum(tl.where(p > 0, p * x, 0.0), 1)
        tl.store(MEAN + out, tl.sum(weighted * tl.exp(most - top), 0))
    value = most
    if NOISE:
        low, high = _mixed_key(KEY, NUMBER, row)
        value = most + tl.log(total) + _gumbel(block.to(tl.uint32) + 0x80000000, low, high)
    value = tl.where(value == value, value, -float("inf"))
    tl.store(BEST + out, tl.max(value, 0))
    tl.store(WHERE + out, part * BLOCKS + tl.argmax(value, 0))


@triton.jit(do_not_specialize=["parts"])
def _sample_merge(
    LOGITS, stride, SOURCE, KEY, NUMBER, BEST, WHERE, TOP, SUM, MEAN, TOKEN, LOGPROB, ENTROPIES, temperature, vocabulary, parts,
    ROW, LEAST, FORBIDDEN, SEEN, THRESHOLD, penalty,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, NOISE: tl.constexpr, TEMPERED: tl.constexpr, MAPPED: tl.constexpr,
    FORBIDS: tl.constexpr, PENALISES: tl.constexpr, CUTS: tl.constexpr, ENTROPY: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    i = tl.arange(0, PARTS)
    inside = i < parts
    winner = tl.minimum(tl.argmax(tl.load(BEST + row * parts + i, mask=inside, other=-float("inf")), 0), parts - 1)
    block = tl.minimum(tl.load(WHERE + row * parts + winner), (vocabulary - 1) // WIDTH)
    top = tl.load(TOP + row * parts + i, mask=inside, other=-1e38)
    most = tl.max(top, 0)
    scale = tl.exp(top - most)
    total = tl.sum(tl.load(SUM + row * parts + i, mask=inside, other=0.0) * scale, 0)
    if ENTROPY:
        mean = tl.sum(tl.load(MEAN + row * parts + i, mask=inside, other=0.0) * scale, 0) / total
        tl.store(ENTROPIES + row, most + tl.log(total) - mean)
    logits, seen, early = _row(LOGITS, stride, SOURCE, ROW, NUMBER, LEAST, SEEN, row, vocabulary, MAPPED, FORBIDS, PENALISES)
    token = block * WIDTH + tl.arange(0, WIDTH)
    x = _shaped(logits, FORBIDDEN, seen, token, vocabulary, early, penalty, temperature, TEMPERED, FORBIDS, PENALISES)
    if CUTS:
        x = tl.where(x >= tl.load(THRESHOLD + row), x, -float("inf"))
    value = x
    if NOISE:
        low, high = _mixed_key(KEY, NUMBER, row)
        value = x + _gumbel(token.to(tl.uint32), low, high)
    place = tl.minimum(tl.argmax(tl.where(value == value, value, -float("inf")), 0), vocabulary - 1 - block * WIDTH)
    chosen = tl.sum(tl.where(tl.arange(0, WIDTH) == place, x, 0.0), 0)
    tl.store(TOKEN + row, (block * WIDTH + place).to(tl.int64))
    tl.store(LOGPROB + row, chosen - most - tl.log(total))


def sample(
    logits: Tensor, temperature: float, noise: bool, keys: Tensor, positions: Tensor, source: Tensor | None = None, shaping: Shaping | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`sampler.sample` of `sampler.shape_logits` without writing the shaped logits down: (token [B] int64, logprob [B], entropy [B] float32).

    logits: [m, V], source: [B] row of them for each sampled row; None = its own. temperature 1 = as given. The entropy is defined only where
    `shaping` asks for it. top-k and top-p cost a search for the threshold, about thirty passes over a row that stays in the cache."""
    batch, vocabulary = len(keys), logits.shape[1]
    blocks = 32
    parts = triton.cdiv(vocabulary, blocks * SAMPLE_BLOCK)
    device = logits.device
    best, top, total, mean = torch.empty(4, batch, parts, device=device)
    where = torch.empty(batch, parts, dtype=torch.int32, device=device)
    token, logprob = torch.empty(batch, dtype=torch.int64, device=device), torch.empty(batch, device=device)
    mapped = keys if source is None else source
    rows = least = forbidden = seen = keys
    threshold = entropy = logprob
    s = shaping.sampling if shaping is not None else None
    penalty, cuts = 1.0, False
    forbids = penalises = False
    if shaping is not None:
        rows, least, penalty = shaping.rows, shaping.least, s.repetition_penalty
        forbids, penalises = shaping.forbidden is not None, shaping.seen is not None
        forbidden, seen = (keys if t is None else t for t in (shaping.forbidden, shaping.seen))
        entropy = torch.empty_like(logprob)
        cuts = s.temperature > 0 and (s.top_k > 0 or s.top_p < 1 or s.min_p > 0)
        if cuts:
            threshold = torch.empty(batch, device=device)
            _thresholds[(batch,)](
                logits, logits.stride(0), mapped, rows, positions, least, forbidden, seen, threshold, temperature, vocabulary, penalty,
                min(s.top_k, vocabulary), s.top_p, math.log(s.min_p) if s.min_p > 0 else -math.inf,
                source is not None, temperature != 1.0, forbids, penalises, s.top_k > 0, s.top_p < 1, 4096, num_warps=8, **_early(),
            )  # fmt: skip
    flags = (noise, temperature != 1.0, source is not None, forbids, penalises, cuts, s is not None and s.entropy)
    shape = (rows, least, forbidden, seen, threshold, penalty)
    _sample_parts[(parts, batch)](
        logits, logits.stride(0), mapped, keys, positions, best, where, top, total, mean, temperature, vocabulary, parts, *shape,
        blocks, SAMPLE_BLOCK, *flags, num_warps=4, **_early(),
    )  # fmt: skip
    _sample_merge[(batch,)](
        logits, logits.stride(0), mapped, keys, positions, best, where, top, total, mean, token, logprob, entropy, temperature, vocabulary, parts,
        *shape, triton.next_power_of_2(parts), SAMPLE_BLOCK, *flags, num_warps=1, **_early(),
    )  # fmt: skip
    return token, logprob, entropy


@triton.jit(do_not_specialize=["batch", "window", "ends"])
def _record(
    TOKEN, LOGPROB, ROW, NEXT, LENGTH, NEW, LIVE, LIMIT, FORCED, IDS, LOGPROBS, LENGTHS, FINISHED, EOS, window, batch, ends,
    END: tl.constexpr, FORCE: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_wait()
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < batch
    live = inside & (tl.load(LIVE + slot, mask=inside, other=0) != 0)
    row = tl.load(ROW + slot, mask=live, other=0)
    token = tl.load(TOKEN + slot, mask=live, other=0)
    new = tl.load(NEW + slot, mask=live, other=0)
    end = tl.arange(0, END)
    ids = tl.load(EOS + end, mask=end < ends, other=-1)
    stops = tl.sum((token[:, None] == ids[None, :]).to(tl.int32), 1) > 0
    if FORCE:
        due = tl.load(FORCED + row, mask=live, other=0)
        token = tl.where((due > 0) & (due == new + 1), tl.load(EOS), token)
        stops = tl.where(due > 0, due == new + 1, stops)
    place = row.to(tl.int64) * window + new
    tl.store(IDS + place, token.to(tl.int32), mask=live)
    tl.store(LOGPROBS + place, tl.load(LOGPROB + slot, mask=live, other=0.0), mask=live)
    tl.store(LENGTHS + row, new + 1, mask=live)
    tl.store(FINISHED + row, stops, mask=live)
    tl.store(NEXT + slot, token, mask=live)
    tl.store(NEW + slot, new + 1, mask=live)
    tl.store(LENGTH + slot, tl.load(LENGTH + slot, mask=live, other=0) + 1, mask=live)
    tl.store(LIVE + slot, (stops == 0) & (new + 1 < tl.load(LIMIT + slot, mask=live, other=0)), mask=live)


def record(token: Tensor, logprob: Tensor, state: Any, out: Any, eos: Tensor) -> None:
    """`loop.record` in one launch: write down what was sampled and decide who goes on. state: `loop.Slots`, out: `loop.Outputs`."""
    batch = len(token)
    _record[(triton.cdiv(batch, 128),)](
        token, logprob, state.row, state.token, state.length, state.new, state.live, state.limit, out.forced, out.ids, out.logprobs, out.lengths,
        out.finished, eos, out.ids.shape[1], batch, len(eos), triton.next_power_of_2(len(eos)), out.forced is not out.lengths, 128,
        num_warps=4, **_early(),
    )  # fmt: skip
