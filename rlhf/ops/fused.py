"""Norms, gated activation and rotary embedding in one kernel each, forward and backward, in Triton; plain torch wherever Triton does not run.

The rollout launches the same forward kernels, so that training and rollout compute the same bits. They round where transformers' modules round; the
plain paths are those modules' own operations. Maths is float32 inside. Nothing is saved but inputs, and no sum depends on who comes first. The module
imports without Triton; calling a kernel then fails.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, no_type_check  # kernels are no Python: mypy must not look at them

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton as triton  # for others too
    import triton.language
except ImportError:  # a CPU build of torch comes without it

    class _Absent:
        """Lets the definitions below be read without Triton."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, function: Any = None, **_: Any) -> Any:
            return function if function is not None else (lambda f: f)

        # What is asked on the way to a kernel, also to one that is not launched (`_launch`).
        def cdiv(self, a: int, b: int) -> int:
            return -(-a // b)

        def next_power_of_2(self, n: int) -> int:
            return 1 << (n - 1).bit_length()

    triton = _Absent()

tl: Any = triton.language


UNFUSED = {"enable_fp_fusion": False}  # for kernels that rotate: a product contracted with a sum would skip the rounding in between
HEAD_ROWS = 16  # heads that are normalised side by side: the tile in which the rollout's attention does it
NORM_TILE = 4096  # elements that one program of the norm's backward has in its registers


@functools.cache
def _early() -> dict[str, Any]:
    """Launch options of a kernel that may be set up while the one before it still runs (programmatic dependent launch, compute capability 9): the gap
    between two kernels of a graph shrinks. Such a kernel waits (`gdc_wait`) before it touches memory."""
    pays = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if pays else {"EARLY": False}


@functools.cache
def _processors() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count if torch.cuda.is_available() else 2


def _in_kernels(*tensors: Tensor) -> bool:
    """Whether kernels compute this: 16 bits, all of one dtype, on a GPU. Or on the meta device, as a forward there tells what one on a GPU keeps
    (`models.activations`)."""
    dtype = tensors[0].dtype
    return dtype in (torch.bfloat16, torch.float16) and all((t.is_cuda or t.is_meta) and t.dtype == dtype for t in tensors)


def _launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *arguments: Any, **options: Any) -> None:
    """Nothing on the meta device."""
    if not first.is_meta:
        kernel[grid](first, *arguments, **options)


def in_autocast(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)  # which torch does not know of the meta device


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


# ------------------------------------------------------------------------------------------------------------------ norms


@triton.jit(do_not_specialize=["n"])
@no_type_check
def _add_norm(X, DELTA, WEIGHT, OUT, n, eps, H: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < H
    x = tl.load(X + row * H + column, mask=inside, other=0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(DELTA + row * H + column, mask=inside, other=0.0).to(tl.float32)).to(X.dtype.element_ty)
        tl.store(X + row * H + column, x, mask=inside)
    x = x.to(tl.float32)
    scaled = (x * tl.rsqrt(tl.sum(x * x, 0) / H + eps)).to(OUT.dtype.element_ty)
    weight = tl.load(WEIGHT + column, mask=inside, other=0.0)
    tl.store(OUT + row * H + column, (scaled.to(tl.float32) * weight.to(tl.float32)).to(OUT.dtype.element_ty), mask=inside)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, rows: int = 0) -> Tensor:
    """x [n, H] += the first n rows of delta, in place; returns RMSNorm(x) * weight, [max(n, rows), H] with undefined rows after the n-th."""
    n, hidden = x.shape
    out = torch.empty(max(n, rows), hidden, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(hidden)
    warps = 4 if block <= 2048 else 8
    _launch(_add_norm, (n,), x, x if delta is None else delta, weight, out, n, eps, hidden, block, delta is not None, num_warps=warps, **_early())
    return out


@triton.jit
@no_type_check
def _rms(low, high, WEIGHT, i, inside, dim, eps, dtype):
    """RMSNorm of heads given as two halves [rows, D / 2]."""
    a, b = low.to(tl.float32), high.to(tl.float32)
    rstd = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / dim + eps)[:, None]
    wa, wb = tl.load(WEIGHT + i, mask=inside, other=0.0), tl.load(WEIGHT + dim // 2 + i, mask=inside, other=0.0)
    low = ((a * rstd).to(dtype).to(tl.float32) * wa.to(tl.float32)[None, :]).to(dtype)
    high = ((b * rstd).to(dtype).to(tl.float32) * wb.to(tl.float32)[None, :]).to(dtype)
    return low, high


@triton.jit(do_not_specialize=["n"])
@no_type_check
def _head_norm(X, WEIGHT, OUT, n, eps, D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, HALF)
    inside = i < D // 2
    wanted = (row < n)[:, None] & inside[None, :]
    place = row[:, None] * D + i[None, :]
    low, high = tl.load(X + place, mask=wanted, other=0.0), tl.load(X + place + D // 2, mask=wanted, other=0.0)
    low, high = _rms(low, high, WEIGHT, i, inside, D, eps, OUT.dtype.element_ty)
    tl.store(OUT + place, low, mask=wanted)
    tl.store(OUT + place + D // 2, high, mask=wanted)


@triton.jit(do_not_specialize=["n"])
@no_type_check
def _norm_gradient(
    X, WEIGHT, DOUT, DX, PARTIAL, n, eps, H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WEIGHTED: tl.constexpr
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(WEIGHT + column, mask=column < H, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(program, tl.cdiv(n, ROWS), programs):
        row = (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (row < n) & (column < H)
        place = row * H + column
        x = tl.load(X + place, mask=inside, other=0.0).to(tl.float32)
        d_out = tl.load(DOUT + place, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / H + eps)[:, None]
        scaled = x * rstd
        d_scaled = d_out * weight
        along = (tl.sum(d_scaled * scaled, 1) / H)[:, None]
        tl.store(DX + place, (rstd * (d_scaled - scaled * along)).to(DX.dtype.element_ty), mask=inside)
        if WEIGHTED:  # the weight has multiplied the rounded value
            total += d_out * scaled.to(X.dtype.element_ty).to(tl.float32)
    if WEIGHTED:
        tl.store(PARTIAL + program * H + tl.arange(0, BLOCK), tl.sum(total, 0), mask=tl.arange(0, BLOCK) < H)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        rows, width = _rows(x), x.shape[-1]
        if x.dim() < 4 or width % 2 or width > 512:
            return add_norm(rows, None, weight, eps).view(x.shape)
        out = torch.empty_like(rows)  # heads are many and narrow: several in one program
        half = triton.next_power_of_2(width // 2)
        _launch(_head_norm, (triton.cdiv(len(rows), HEAD_ROWS),), rows, weight, out, len(rows), eps, width, half, HEAD_ROWS, num_warps=4, **UNFUSED)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        weighted = ctx.needs_input_grad[1]
        rows, width = _rows(x), x.shape[-1]
        d_x = torch.empty_like(rows)
        block = triton.next_power_of_2(width)
        side = max(1, NORM_TILE // block)
        programs = min(triton.cdiv(len(rows), side), 2 * _processors())  # a fixed number: each sums its rows in their order, then they are summed
        partial = torch.empty(programs, width, device=x.device) if weighted else weight
        warps = 8 if block <= 4096 else 16
        _launch(
            _norm_gradient, (programs,),
            rows, weight, _rows(d_out), d_x, partial, len(rows), ctx.eps, width, block, side, weighted, num_warps=warps
        )  # fmt: skip
        return d_x.view(x.shape), partial.sum(0).to(weight.dtype) if weighted else None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] / sqrt(mean(x^2) + eps) * weight [H], the quotient rounded before it is multiplied, as LlamaRMSNorm does.

    Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467."""
    if _in_kernels(x, weight):
        out: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return out
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


# ------------------------------------------------------------------------------------------------------- gated activation


@triton.jit(do_not_specialize=["n"])
@no_type_check
def _silu_mul(GATE, UP, OUT, n, WIDTH: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(GATE + row * STRIDE + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * STRIDE + column, mask=inside, other=0.0).to(tl.float32)
    dtype = OUT.dtype.element_ty
    act = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(OUT + row * WIDTH + column, (act * up).to(dtype), mask=inside)


def silu_mul(gate_up: Tensor, n: int, rows: int = 0) -> Tensor:
    """[>= n, 2 I] -> silu(first half) * second half of the first n rows, [max(n, rows), I] with undefined rows after the n-th."""
    width = gate_up.shape[1] // 2
    out = torch.empty(max(n, rows), width, dtype=gate_up.dtype, device=gate_up.device)
    _launch(_silu_mul, (n, triton.cdiv(width, 1024)), gate_up, gate_up[:, width:], out, n, width, 2 * width, 1024, num_warps=4, **_early())
    return out


@triton.jit
@no_type_check
def _silu_mul_gradient(
    GATE, UP, DOUT, DGATE, DUP, OUT, WIDTH: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, AGAIN: tl.constexpr
):  # fmt: skip
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    row = tl.program_id(0).to(tl.int64)
    place, pair = row * WIDTH + column, row * STRIDE + column
    gate = tl.load(GATE + pair, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + pair, mask=inside, other=0.0).to(tl.float32)
    d_out = tl.load(DOUT + place, mask=inside, other=0.0).to(tl.float32)
    dtype = DUP.dtype.element_ty
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    act = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)  # what `up` was multiplied by
    if AGAIN:
        tl.store(OUT + place, (act * up).to(dtype), mask=inside)
    tl.store(DUP + pair, (d_out * act).to(dtype), mask=inside)
    tl.store(DGATE + pair, (d_out * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))).to(dtype), mask=inside)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        g, u = _rows(gate), _rows(up)
        out, (n, width) = torch.empty_like(g), g.shape
        _launch(_silu_mul, (n, triton.cdiv(width, 1024)), g, u, out, n, width, width, 1024, num_warps=4, **_early())
        return out.view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (_rows(t) for t in ctx.saved_tensors)
        d_gate, d_up, _ = _gradients(gate, up, _rows(d_out), again=False)
        return d_gate.view(d_out.shape), d_up.view(d_out.shape)


def _gradients(gate: Tensor, up: Tensor, d_out: Tensor, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    """[n, I] each: gradients of gate and up, and if asked what the forward gave."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    out = torch.empty_like(gate) if again else gate
    n, width = gate.shape
    _launch(_silu_mul_gradient, (n, triton.cdiv(width, 1024)), gate, up, d_out, d_gate, d_up, out, width, width, 1024, again, num_warps=4)
    return d_gate, d_up, out


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [n, 2 I], both side by side -> [n, I]; outside of autograd, beside `gated_gradient`."""
    if _in_kernels(gate_up):
        return silu_mul(gate_up, len(gate_up))
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def gated_gradient(gate_up: Tensor, d_out: Tensor) -> Tensor:
    """[n, 2 I] gradient of `gate_up`, from d_out [n, I], which becomes what `gated` gave."""
    n, width = d_out.shape
    d_gate_up = torch.empty_like(gate_up)
    if _in_kernels(gate_up, d_out):
        _launch(
            _silu_mul_gradient, (n, triton.cdiv(width, 1024)),
            gate_up, gate_up[:, width:], d_out, d_gate_up, d_gate_up[:, width:], d_out, width, 2 * width, 1024, True, num_warps=4
        )  # fmt: skip
        return d_gate_up
    gate, up = gate_up.chunk(2, -1)
    act = F.silu(gate)
    torch.mul(d_out, act, out=d_gate_up[:, width:])
    slope = torch.sigmoid(gate)
    slope.mul_((1 - slope).mul_(gate).add_(1))
    torch.mul(slope.mul_(up), d_out, out=d_gate_up[:, :width])
    torch.mul(act, up, out=d_out)
    return d_gate_up


class _Again:
    """Whether forwards run only for what they keep."""

    active = False


@contextlib.contextmanager
def computed_again() -> Iterator[None]:
    """Within it a layer or MLP is computed again for its backward pass: the result of `gated_down`, the last to keep anything, is left undefined."""
    before, _Again.active = _Again.active, True
    try:
        yield
    finally:
        _Again.active = before


def only_kept() -> bool:
    """Whether this forward runs only for what it keeps."""
    return _Again.active


class _GatedDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        if only_kept():
            return gate.new_empty(*gate.shape[:-1], len(weight))
        g = _rows(gate)
        inner, (n, width) = torch.empty_like(g), g.shape
        _launch(_silu_mul, (n, triton.cdiv(width, 1024)), g, _rows(up), inner, n, width, width, 1024, num_warps=4, **_early())
        return F.linear(inner, weight).view(*gate.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up, weight = ctx.saved_tensors
        d_rows = _rows(d_out)
        d_gate, d_up, inner = _gradients(_rows(gate), _rows(up), d_rows @ weight, again=ctx.needs_input_grad[2])
        return d_gate.view(gate.shape), d_up.view(up.shape), d_rows.t() @ inner if ctx.needs_input_grad[2] else None


def gated_down(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """(silu(gate) * up) @ weight.T: gate, up [..., I], weight [H, I] -> [..., H]. From kernels, what the product takes is not kept for its gradient
    but made again: it is among the largest tensors of a layer, and cheap."""
    if _in_kernels(gate, up, weight) and gate.shape == up.shape:
        out: Tensor = _GatedDown.apply(gate, up, weight)  # type: ignore[no-untyped-call]
        return out
    return F.linear(F.silu(gate) * up, weight)


def silu_mul_pair(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [..., I]; silu is rounded before it is multiplied, as in transformers' gated MLPs.

    Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202."""
    if _in_kernels(gate, up) and gate.shape == up.shape:
        out: Tensor = _SiluMul.apply(gate, up)  # type: ignore[no-untyped-call]
        return out
    return F.silu(gate) * up


# ----------------------------------------------------------------------------------------------------------------- product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        rows = _rows(x)
        out = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        d_rows = _rows(d_out)
        d_x = (d_rows @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        d_weight = d_rows.t() @ _rows(x) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, d_rows.sum(0) if ctx.needs_input_grad[2] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] @ weight [out, in].T + bias [out]. On a GPU in 16 bits without the detour of DeepSpeed's own, which adds the bias in a pass of its
    own (and rounds twice) and takes longer on the host than a small product on the device."""
    if _in_kernels(x, weight, *([] if bias is None else [bias])) and not in_autocast(x):
        out: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return out
    return F.linear(x, weight, bias)


# ------------------------------------------------------------------------------------------------------- rotary embedding


@triton.jit
@no_type_check
def _rotate(low, high, cos, sin, dtype):
    """Products rounded one by one, as the training model's elementwise operations do."""
    a, b = low.to(tl.float32), high.to(tl.float32)
    first = ((a * cos).to(dtype).to(tl.float32) - (b * sin).to(dtype).to(tl.float32)).to(dtype)
    second = ((b * cos).to(dtype).to(tl.float32) + (a * sin).to(dtype).to(tl.float32)).to(dtype)
    return first, second


@triton.jit
@no_type_check
def _rotate_token(SOURCE, stride, OUT, cos, sin, HEADS: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """All heads of one token, at SOURCE + head * stride, to OUT [HEADS, D]."""
    head, i = tl.arange(0, PADDED)[:, None].to(tl.int64), tl.arange(0, HALF)[None, :]
    wanted = (head < HEADS) & (i < D // 2)
    source, out = SOURCE + head * stride + i, OUT + head * D + i
    low, high = tl.load(source, mask=wanted, other=0.0), tl.load(source + D // 2, mask=wanted, other=0.0)
    low, high = _rotate(low, high, cos, sin, OUT.dtype.element_ty)
    tl.store(out, low, mask=wanted)
    tl.store(out + D // 2, high, mask=wanted)


@triton.jit(do_not_specialize=["length"])
@no_type_check
def _rotate_heads(
    Q, q_row, q_head, q_token, K, k_row, k_head, k_token, COS, SIN, c_row, OUT_Q, OUT_K, length,
    HQ: tl.constexpr, HK: tl.constexpr, QP: tl.constexpr, KP: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row, place = token // length, token % length
    i = tl.arange(0, HALF)
    angle = row * c_row + place * D + i
    cos = tl.load(COS + angle, mask=i < D // 2, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(SIN + angle, mask=i < D // 2, other=0.0).to(tl.float32)[None, :]
    if BACK:
        sin = -sin
    _rotate_token(Q + row * q_row + place * q_token, q_head, OUT_Q + token * HQ * D, cos, sin, HQ, QP, D, HALF)
    _rotate_token(K + row * k_row + place * k_token, k_head, OUT_K + token * HK * D, cos, sin, HK, KP, D, HALF)


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """q, k [B, heads, T, D] with any strides -> the same shapes, [B, T, heads, D] in memory."""
    batch, heads, length, dim = q.shape
    kv_heads = k.shape[1]
    q, k = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k))
    cos, sin = cos.contiguous(), sin.contiguous()
    out_q, out_k = (
        torch.empty_strided((batch, n, length, dim), (length * n * dim, dim, n * dim, 1), dtype=q.dtype, device=q.device) for n in (heads, kv_heads)
    )
    padded, half = triton.next_power_of_2(heads), triton.next_power_of_2(dim // 2)
    _launch(
        _rotate_heads, (batch * length,),
        q, *q.stride()[:3], k, *k.stride()[:3], cos, sin, length * dim if len(cos) > 1 else 0, out_q, out_k, length,
        heads, kv_heads, padded, triton.next_power_of_2(kv_heads), dim, half, back, num_warps=max(1, min(8, padded * half // 256)), **UNFUSED,
    )  # fmt: skip
    return out_q, out_k


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotated(q, k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return (*_rotated(d_q, d_k, cos, sin, True), None, None)


def rotates(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernel computes this: whole heads, and angles that need not be spread over anything but heads and rows."""
    if not (q.dim() == k.dim() == 4 and cos.dim() == 3 and cos.shape == sin.shape and _in_kernels(q, k, cos, sin)):
        return False
    batch, _, length, dim = q.shape
    return k.shape[0] == batch and k.shape[2:] == (length, dim) and cos.shape[1:] == (length, dim) and len(cos) in (1, batch) and dim % 2 == 0


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' `apply_rotary_pos_emb`: q [B, HQ, T, D] and k [B, HK, T, D] turned by the angles whose cos and sin [1 or B, T, D] are given,
    element i with element i + D / 2; the two halves of cos and sin are the same. From a kernel the results are [B, T, heads, D] in memory.

    Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864."""
    if rotates(q, k, cos, sin):
        out: tuple[Tensor, Tensor] = _Rotate.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
        return out
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    half = q.shape[-1] // 2
    turned = [torch.cat((-t[..., half:], t[..., :half]), dim=-1) for t in (q, k)]
    return (q * cos) + (turned[0] * sin), (k * cos) + (turned[1] * sin)
