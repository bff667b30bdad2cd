"""Token sampling with noise that depends on who is sampled, never on where or when.

Every random number is a hash of (seed, stream, draw, sample, position, token id). Rank, batch slot, batch size, order and restarts
have no influence, so the same sample always gets the same noise (trap 25), and no two samples share any (trap 34).
"""

from __future__ import annotations

import math

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


SAMPLE_BLOCK = 128  # tokens that are drawn together first
BLOCK_STREAM = 1 << 31  # noise indices from here on are blocks', below are tokens'


def gumbel_noise(keys: Tensor, positions: Tensor, indices: Tensor) -> Tensor:
    """[B, n] float32 standard Gumbel noise of the tokens (or blocks) `indices` [n] or [B, n] at `positions` [B] of the rows with `keys` [B]."""
    mixed = keys ^ (positions.to(keys.device).long() * _signed(_GOLDEN, 64))
    mixed = mixed ^ ((mixed >> 32) & 0xFFFFFFFF)
    mixed = mixed * _signed(0xD6E8FEB86659FD93, 64)
    mixed = mixed ^ ((mixed >> 32) & 0xFFFFFFFF)
    mixed = mixed * _signed(0xD6E8FEB86659FD93, 64)
    low, high = mixed.int(), (mixed >> 32).int()
    spread = indices.to(keys.device).to(torch.int32) * _signed(0x9E3779B1, 32)
    bits = _mix32(spread.expand(len(keys), spread.shape[-1]) ^ low[:, None])
    bits = _mix32(bits.add_(high[:, None]))
    # bits -> u in (0, 1) with full resolution near 0; E = -log(1 - u) is exponential and precise where it is small, which is where
    # the largest (deciding) Gumbel values -log(E) come from.
    uniform = bits.float()
    uniform = torch.where(uniform < 0, uniform + 4294967296.0, uniform).add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return torch.log1p(uniform.neg_()).neg_().log_().neg_()


def plain(sampling: Sampling) -> bool:
    """Nothing but temperature: one pass over the logits is enough."""
    return (
        sampling.top_k == 0
        and sampling.top_p >= 1
        and sampling.min_p == 0
        and sampling.repetition_penalty == 1
        and sampling.min_new_tokens == 0
        and not sampling.bad_token_ids
        and not sampling.entropy
    )


def shape_logits(logits: Tensor, sampling: Sampling, too_early: Tensor, eos: Tensor, seen: Tensor | None) -> Tensor:
    """[B, V] float32 logits of the distribution to sample from, in the order of transformers' processors: penalty, forbidden tokens, temperature,
    top-k, top-p (Holtzman et al. 2019, arXiv:1904.09751), min-p (Nguyen et al. 2024, arXiv:2407.01082).

    too_early: [B] bool, rows that must not end yet; seen: [B, V] bool, tokens under the repetition penalty (Keskar et al. 2019, arXiv:1909.05858).
    """
    out = logits.float().clone()
    if seen is not None:
        penalty = sampling.repetition_penalty
        out = torch.where(seen, torch.where(out > 0, out / penalty, out * penalty), out)
    for token in sampling.bad_token_ids:  # one by one: a list of indices would be a copy from the host, which a graph cannot hold
        out[:, token] = -torch.inf
    if sampling.min_new_tokens:
        out[:, eos] = torch.where(too_early[:, None], -torch.inf, out[:, eos])
    if sampling.temperature == 0:
        return out
    out = out / sampling.temperature
    if sampling.top_k:
        kth = out.topk(min(sampling.top_k, out.shape[-1]), dim=-1).values[:, -1:]
        out = out.masked_fill(out < kth, -torch.inf)
    if sampling.top_p < 1:
        ordered = out.sort(dim=-1, descending=True).values
        probabilities = ordered.softmax(-1)
        kept = probabilities.cumsum(-1) - probabilities < sampling.top_p  # with the token that crosses top_p, and all that are equal to it
        out = out.masked_fill(out < ordered.gather(-1, (kept.sum(-1, keepdim=True) - 1).clamp(min=0)), -torch.inf)
    if sampling.min_p > 0:
        out = out.masked_fill(out < out.amax(-1, keepdim=True) + math.log(sampling.min_p), -torch.inf)
    return out


def sample(logits: Tensor, temperature: float, noise: bool, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(token [B], logprob [B] float32 under softmax(logits / temperature)); without noise the largest logit.

    By the Gumbel-max trick (Gumbel 1954) twice: among blocks of tokens by their log-sum-exp, then among the tokens of the block that won. The
    distribution is the softmax exactly (a maximum of Gumbels is a Gumbel at the log-sum-exp; Maddison et al. 2014, arXiv:1411.0030), and
    noise is needed for a hundredth of the vocabulary only.
    """
    scaled = logits.float()
    if temperature != 1.0:
        scaled = scaled / temperature
    batch, vocabulary = scaled.shape
    short = -vocabulary % SAMPLE_BLOCK
    blocks = (torch.nn.functional.pad(scaled, (0, short), value=-torch.inf) if short else scaled).view(batch, -1, SAMPLE_BLOCK)
    sums = blocks.logsumexp(-1)
    if noise:
        block = (sums + gumbel_noise(keys, positions, torch.arange(blocks.shape[1]) + BLOCK_STREAM)).argmax(-1)
    else:
        block = blocks.amax(-1).argmax(-1)
    inside = blocks[torch.arange(batch, device=blocks.device), block]
    tokens = block[:, None] * SAMPLE_BLOCK + torch.arange(SAMPLE_BLOCK, device=blocks.device)
    place = (inside + gumbel_noise(keys, positions, tokens) if noise else inside).argmax(-1, keepdim=True)
    return tokens.gather(-1, place).squeeze(1), inside.gather(-1, place).squeeze(1) - sums.logsumexp(-1)
