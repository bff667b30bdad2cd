"""Token sampling with noise that depends on who is sampled, never on where or when.

Every random number is a hash of (seed, stream, draw, sample, position, token id). Rank, batch slot, batch size, order and restarts
have no influence, so the same sample always gets the same noise (trap 25), and no two samples share any (trap 34).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rlhf.types import Sampling

_U64 = np.uint64
_GOLDEN = 0x9E3779B97F4A7C15


def _mix64(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea and Flood 2014, OOPSLA, "Fast splittable pseudorandom number generators")."""
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def row_keys(seed: int, stream: int, draws: Tensor, samples: Tensor) -> Tensor:
    """[B] int64 key of each sampled row, from its identity."""
    with np.errstate(over="ignore"):
        key = np.full(len(draws), (seed * 2 + stream) & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
        for part in (draws.numpy(), samples.numpy()):
            key = _mix64(key + _U64(_GOLDEN) + part.astype(np.uint64) * _U64(0xD1342543DE82EF95))
    return torch.from_numpy(key.view(np.int64))


def _signed(x: int, bits: int) -> int:
    return x - (1 << bits) if x >= 1 << (bits - 1) else x


_C32_1, _C32_2 = _signed(0x85EBCA6B, 32), _signed(0xC2B2AE35, 32)


def _mix32(x: Tensor) -> Tensor:
    """murmur3's 32-bit finaliser, in place, on int32 (wrapping products; >> is arithmetic, so it is masked)."""
    x ^= (x >> 16) & 0xFFFF
    x *= _C32_1
    x ^= (x >> 13) & 0x7FFFF
    x *= _C32_2
    x ^= (x >> 16) & 0xFFFF
    return x


def gumbel_noise(keys: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """[B, V] float32 standard Gumbel noise for the token at `positions` [B] of the rows with `keys` [B]."""
    mixed = keys ^ (positions.to(keys.device).long() * _signed(_GOLDEN, 64))
    mixed = mixed ^ ((mixed >> 32) & 0xFFFFFFFF)
    mixed = mixed * _signed(0xD6E8FEB86659FD93, 64)
    mixed = mixed ^ ((mixed >> 32) & 0xFFFFFFFF)
    mixed = mixed * _signed(0xD6E8FEB86659FD93, 64)
    low, high = mixed.int(), (mixed >> 32).int()
    tokens = torch.arange(vocabulary, dtype=torch.int32, device=keys.device) * _signed(0x9E3779B1, 32)
    bits = _mix32(tokens[None, :] ^ low[:, None])
    bits = _mix32(bits.add_(high[:, None]))
    # bits -> u in (0, 1) with full resolution near 0; E = -log(1 - u) is exponential and precise where it is small, which is where
    # the largest (deciding) Gumbel values -log(E) come from.
    uniform = bits.float()
    uniform = torch.where(uniform < 0, uniform + 4294967296.0, uniform).add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return torch.log1p(uniform.neg_()).neg_().log_().neg_()


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """[B, V] logits with everything outside top-k / top-p (nucleus, Holtzman et al. 2019, arXiv:1904.09751) at -inf."""
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1.0:
        ordered, index = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        outside = probabilities.cumsum(-1) - probabilities >= top_p  # the token that crosses top_p is kept
        logits = logits.masked_fill(outside.scatter(-1, index, outside), float("-inf"))
    return logits


def sample(logits: Tensor, sampling: Sampling, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(token [B], logprob [B] float32 under the distribution sampled from), by the Gumbel-max trick (Gumbel 1954).

    temperature 0 takes the largest logit; its logprob is then that of the distribution at temperature 1.
    """
    scaled = logits.float()
    if sampling.temperature > 0:
        scaled = filter_logits(scaled / sampling.temperature, sampling.top_k, sampling.top_p)
        token = (scaled + gumbel_noise(keys, positions, scaled.shape[-1])).argmax(-1)
    else:
        token = scaled.argmax(-1)
    logprob = scaled.gather(-1, token[:, None]).squeeze(1) - scaled.logsumexp(-1)
    return token, logprob
