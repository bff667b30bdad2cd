"""The head's last step without its logits: logprob and entropy of given tokens, forward and backward, a chunk of tokens at a time.

For n tokens and V words there is never an [n, V] tensor: only [CHUNK, V] in the weights' dtype, made once in the forward pass and once more in the
backward pass (as in Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009, with the library's products). The
last chunk is kept from one to the other: the head ends the forward and begins the backward pass, and nobody needs the room in between; the first is
what remains, so that the last is a whole one. Where the head's weight is frozen (LoRA) once is enough: what a token's logprob asks of its hidden
state does not depend on the loss but for a factor.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf.ops.fused import tl, triton

CHUNK_BYTES = 2 << 30  # of logits that exist at once


def score_tokens(
    hidden: Float[Tensor, "n h"],
    weight: Float[Tensor, "v h"],
    tokens: Int[Tensor, " n"],
    temperature: float = 1.0,
    entropy_gradient: bool = False,
    chunk_bytes: int | None = None,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """(logprob of each token, entropy of its distribution), float32, under softmax(hidden @ weight.T / temperature).

    The same as `token_logprobs` of those logits. The entropy carries gradients only if asked."""
    chunk = max(1, (chunk_bytes or CHUNK_BYTES) // (weight.shape[0] * hidden.element_size()))
    frozen = torch.is_grad_enabled() and hidden.requires_grad and not weight.requires_grad and not entropy_gradient
    if frozen:
        found: tuple[Tensor, Tensor] = _ScoreTokensFrozen.apply(hidden, weight, tokens, temperature, chunk)  # type: ignore[no-untyped-call]
        return found
    logprobs, entropy = _ScoreTokens.apply(  # type: ignore[no-untyped-call]
        hidden, weight, tokens, temperature, entropy_gradient, chunk, torch.is_grad_enabled()
    )
    return logprobs, entropy if entropy_gradient else entropy.detach()


class _ScoreTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, entropy_gradient: bool, chunk: int, keep: bool
    ) -> tuple[Tensor, Tensor]:
        n, tokens = len(hidden), tokens.contiguous()
        log_z, mean, chosen = (torch.empty(n, device=hidden.device) for _ in range(3))
        logits: Tensor | None = None
        for part in _chunks(n, chunk):
            logits = None  # given back before the next is made
            logits = F.linear(hidden[part], weight)
            _statistics(logits, tokens[part], temperature, log_z[part], mean[part], chosen[part])
        ctx.save_for_backward(hidden, weight, tokens, log_z, mean)
        ctx.temperature, ctx.entropy_gradient, ctx.chunk = temperature, entropy_gradient, chunk
        ctx.last = logits if keep else None
        return chosen - log_z, log_z - mean

    @staticmethod
    def backward(ctx: Any, d_logprobs: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens, log_z, mean = ctx.saved_tensors
        # What the loss gives lies as it likes: of the scores of one tensor [n, 2] every second number is a logprob's.
        d_logprobs, d_entropy = d_logprobs.contiguous(), d_entropy.contiguous()
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        n, chunk = len(hidden), ctx.chunk
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = None if n else torch.zeros_like(weight)  # whoever accumulates waits for one
        logits, ctx.last = ctx.last, None
        for part in _chunks(n, chunk)[::-1]:
            if logits is None:
                logits = F.linear(hidden[part], weight)
            _gradient(
                logits, tokens[part], ctx.temperature, log_z[part], mean[part], d_logprobs[part], d_entropy[part] if ctx.entropy_gradient else None
            )
            if d_hidden is not None:
                torch.mm(logits, weight, out=d_hidden[part])
            if wants_weight:
                d_weight = _accumulate(d_weight, logits.t(), hidden[part], n > chunk)
            logits = None
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None, None


class _ScoreTokensFrozen(torch.autograd.Function):
    """Of a weight that is not trained, entropy without gradient: the gradient of each logprob is taken while its logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, chunk: int) -> tuple[Tensor, Tensor]:
        n, tokens = len(hidden), tokens.contiguous()
        log_z, mean, chosen = (torch.empty(n, device=hidden.device) for _ in range(3))
        d_hidden, one = torch.empty_like(hidden), torch.ones(n, device=hidden.device)
        for part in _chunks(n, chunk):
            logits = F.linear(hidden[part], weight)
            _statistics(logits, tokens[part], temperature, log_z[part], mean[part], chosen[part])
            _gradient(logits, tokens[part], temperature, log_z[part], mean[part], one[part], None)
            torch.mm(logits, weight, out=d_hidden[part])
            del logits  # before the next is made
        ctx.save_for_backward(d_hidden)
        entropy = log_z - mean
        ctx.mark_non_differentiable(entropy)
        return chosen - log_z, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (d_hidden,) = ctx.saved_tensors
        return (d_hidden * d_logprobs[:, None]).to(d_hidden.dtype), None, None, None, None


def _chunks(n: int, chunk: int) -> list[slice]:
    """Of n tokens: what remains, then whole chunks."""
    return [slice(max(0, end - chunk), end) for end in range(n, 0, -chunk)][::-1]


def _accumulate(total: Tensor | None, left: Tensor, right: Tensor, wide: bool) -> Tensor:
    """total + left @ right, in place; `wide`: kept in float32, because several will be added."""
    if not wide or left.dtype == torch.float32 or not left.is_cuda:
        product = left @ right
        if total is None:
            return product.float() if wide else product
        return total.add_(product)
    if total is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def _in_kernels(logits: Tensor) -> bool:
    return logits.is_cuda


def _check_dense(*tensors: Tensor) -> None:
    """Kernels count elements one by one from the first: of anything else they would read, or write, other numbers without an error."""
    if not all(t.is_contiguous() for t in tensors):
        raise RuntimeError(f"a kernel of the head was given tensors with strides {[t.stride() for t in tensors]}")


def _statistics(logits: Tensor, tokens: Tensor, temperature: float, log_z: Tensor, mean: Tensor, chosen: Tensor) -> None:
    """Of logits [c, V] / temperature: log of the sum of exponentials, mean under the softmax, the token's own; written to [c] float32 each."""
    if _in_kernels(logits):
        _check_dense(logits, tokens, log_z, mean, chosen)
        _statistics_kernel[(len(logits),)](logits, tokens, log_z, mean, chosen, logits.shape[1], temperature, 4096, num_warps=8)
        return
    scaled = logits.float() / temperature
    log_z.copy_(torch.logsumexp(scaled, -1))
    mean.copy_((torch.exp(scaled - log_z[:, None]) * scaled).sum(-1))
    chosen.copy_(scaled.gather(-1, tokens[:, None]).squeeze(-1))


def _gradient(logits: Tensor, tokens: Tensor, temperature: float, log_z: Tensor, mean: Tensor, d_logprob: Tensor, d_entropy: Tensor | None) -> None:
    """logits [c, V] become their own gradient, in place. With p = softmax: d logprob = 1[token] - p, d entropy = -p (logit - mean)."""
    if _in_kernels(logits):
        _check_dense(logits, tokens, log_z, mean, d_logprob, *([] if d_entropy is None else [d_entropy]))
        width = logits.shape[1]
        _gradient_kernel[(len(logits), triton.cdiv(width, 4096))](
            logits, tokens, log_z, mean, d_logprob, d_logprob if d_entropy is None else d_entropy, width, temperature, 4096, d_entropy is not None,
            num_warps=8,
        )  # fmt: skip
        return
    scaled = logits.float() / temperature
    p = torch.exp(scaled - log_z[:, None])
    gradient = -p * d_logprob[:, None]
    if d_entropy is not None:
        gradient -= p * (scaled - mean[:, None]) * d_entropy[:, None]
    gradient.scatter_add_(1, tokens[:, None], d_logprob[:, None].to(gradient.dtype))
    logits.copy_(gradient / temperature)


@triton.jit
@no_type_check
def _statistics_kernel(LOGITS, TOKEN, LOG_Z, MEAN, CHOSEN, width, temperature, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -1e30, tl.float32)  # a running maximum per lane: one reduction at the end
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + column < width
        x = tl.load(LOGITS + row * width + start + column, mask=inside, other=0.0).to(tl.float32) / temperature
        larger = tl.maximum(top, tl.where(inside, x, -1e30))
        shrink = tl.exp(top - larger)
        e = tl.where(inside, tl.exp(x - larger), 0.0)
        total = total * shrink + e
        weighted = weighted * shrink + e * x
        top = larger
    peak = tl.max(top, 0)
    shrink = tl.exp(top - peak)
    z = tl.sum(total * shrink, 0)
    tl.store(LOG_Z + row, peak + tl.log(z))
    tl.store(MEAN + row, tl.sum(weighted * shrink, 0) / z)
    tl.store(CHOSEN + row, tl.load(LOGITS + row * width + tl.load(TOKEN + row)).to(tl.float32) / temperature)


@triton.jit
@no_type_check
def _gradient_kernel(
    LOGITS, TOKEN, LOG_Z, MEAN, D_LOGPROB, D_ENTROPY, width, temperature, BLOCK: tl.constexpr, ENTROPY: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(LOGITS + row * width + column, mask=inside, other=0.0).to(tl.float32) / temperature
    p = tl.exp(x - tl.load(LOG_Z + row))
    d = tl.load(D_LOGPROB + row)
    gradient = tl.where(column == tl.load(TOKEN + row), d, 0.0) - p * d
    if ENTROPY:
        gradient -= p * (x - tl.load(MEAN + row)) * tl.load(D_ENTROPY + row)
    tl.store(LOGITS + row * width + column, (gradient / temperature).to(LOGITS.dtype.element_ty), mask=inside)
