"""Sampling: the right distribution (traps 17, 18), noise that depends on identity only (trap 25), streams apart (trap 34)."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from rlhf.config import RolloutConfig, ValidationConfig
from rlhf.rollout.sampler import filter_logits, gumbel_noise, row_keys, sample
from rlhf.types import Sampling

V = 12
LOGITS = torch.tensor([0.7, -3.0, 1.5, 0.0, -0.9, 2.0, 0.3, -2.0, 1.0, -0.4, -2.5, -1.3])
LARGEST_FIRST = [5, 2, 8, 0, 6, 3, 9, 4, 11, 7, 10, 1]


def keys(draws: Tensor | int, samples: Tensor | int, seed: int = 0, stream: int = 0) -> Tensor:
    draws, samples = torch.broadcast_tensors(torch.as_tensor(draws), torch.as_tensor(samples))
    return row_keys(seed, stream, draws.flatten(), samples.flatten()).reshape(draws.shape)


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """z-score of Pearson's statistic (Wilson and Hilferty 1931), over outcomes that are possible; impossible ones must not occur."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible].double() * counts.sum()
    statistic, freedom = float(((counts[possible] - expected) ** 2 / expected).sum()), int(possible.sum()) - 1
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


def frequencies(sampling: Sampling, row_key: Tensor, positions: Tensor) -> Tensor:
    token, _ = sample(LOGITS.expand(len(row_key), V), sampling, row_key, positions)
    return torch.bincount(token, minlength=V)


N = 40_000
WAYS = {
    "draws": (keys(torch.arange(N), 0), torch.zeros(N, dtype=torch.int64)),
    "samples of one prompt": (keys(17, torch.arange(N)), torch.full((N,), 3)),
    "positions of one response": (keys(5, 2).expand(N).contiguous(), torch.arange(N)),
    "a rollout": (keys(torch.arange(N) // 400, torch.arange(N) // 50 % 8), torch.arange(N) % 50),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_trap_17_frequencies_are_those_of_the_softmax(way: str, temperature: float) -> None:
    """trap 17"""
    counts = frequencies(Sampling(1, temperature), *WAYS[way])
    assert abs(chi_square(counts, (LOGITS / temperature).softmax(-1))) < 4
    assert int((counts > 0).sum()) > 8


@pytest.mark.parametrize(("top_k", "top_p"), [(4, 1.0), (0, 0.8), (5, 0.7)])
def test_trap_17_and_18_filtered_frequencies(top_k: int, top_p: float) -> None:
    """trap 17, trap 18: within the kept set, worked out here by walking down the sorted probabilities, and renormalised over it."""
    kept = LOGITS.softmax(-1).sort(descending=True).values
    if top_k:
        kept = kept[:top_k] / kept[:top_k].sum()
    size = next(n for n in range(1, len(kept) + 1) if float(kept[:n].sum()) >= min(top_p, 0.999999))
    expected = torch.zeros(V)
    inside = LARGEST_FIRST[:size]
    expected[inside] = LOGITS.softmax(-1)[inside] / LOGITS.softmax(-1)[inside].sum()
    for way in WAYS.values():
        assert abs(chi_square(frequencies(Sampling(1, 1.0, top_k, top_p), *way), expected)) < 4
    tokens, logprobs = sample(LOGITS.expand(100, V), Sampling(1, 1.0, top_k, top_p), keys(torch.arange(100), 0), torch.zeros(100, dtype=torch.int64))
    torch.testing.assert_close(logprobs, expected.log()[tokens])


def test_trap_18_filters_are_for_validation_only() -> None:
    """trap 18"""
    for wrong in ({"top_k": 20}, {"top_p": 0.9}):
        with pytest.raises(ValueError, match=r"trap 18.*they belong in validation"):
            RolloutConfig(**wrong)  # type: ignore[arg-type]
        ValidationConfig(**wrong)  # type: ignore[arg-type]


def test_filters_keep_at_least_one_token_and_leave_rows_alone() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0)])
    assert filter_logits(logits, 0, 1e-6).isfinite().nonzero().tolist() == [[0, 5], [1, 6]]
    assert filter_logits(logits, 1, 1.0).isfinite().nonzero().tolist() == [[0, 5], [1, 6]]
    assert torch.equal(filter_logits(logits, 0, 1.0), logits)
    assert torch.equal(filter_logits(logits, 99, 1.0), logits)


def test_greedy_takes_the_largest_logit() -> None:
    token, logprob = sample(LOGITS[None], Sampling(1, 0.0), keys(torch.tensor([1]), 0), torch.tensor([0]))
    assert token.item() == 5
    torch.testing.assert_close(logprob, LOGITS.log_softmax(-1)[5:6])


def test_trap_25_noise_depends_on_identity_only() -> None:
    """trap 25: a row's noise is the same alone, in a batch, and in another order."""
    row_key, positions = keys(torch.arange(32), torch.arange(32) % 4), torch.arange(32)
    together = gumbel_noise(row_key, positions, 100)
    alone = torch.cat([gumbel_noise(row_key[i : i + 1], positions[i : i + 1], 100) for i in range(32)])
    order = torch.randperm(32)
    assert torch.equal(together, alone)
    assert torch.equal(gumbel_noise(row_key[order], positions[order], 100), together[order])
    # A larger vocabulary (padding of the head) leaves the noise of the first tokens alone.
    assert torch.equal(gumbel_noise(row_key, positions, 128)[:, :100], together)


def test_noise_is_pinned() -> None:
    """A change here changes the samples of every run that was started before."""
    noise = gumbel_noise(keys(torch.tensor([0, 1]), torch.tensor([0, 3]), seed=7, stream=1), torch.tensor([0, 5]), 3)
    torch.testing.assert_close(noise, torch.tensor(PINNED), atol=1e-5, rtol=0)


PINNED = [[0.136113, 0.613016, 0.954482], [-0.652618, 0.046892, -0.990818]]


def test_noise_is_gumbel() -> None:
    """Kolmogorov-Smirnov against exp(-exp(-x)); the extremes, which decide at small probabilities, are there too."""
    noise = gumbel_noise(keys(torch.arange(500), 1), torch.zeros(500, dtype=torch.int64), 2000).flatten().double().sort().values
    expected = torch.exp(-torch.exp(-noise))
    steps = torch.arange(1, len(noise) + 1) / len(noise)
    assert float((steps - expected).abs().max()) < 1.95 / math.sqrt(len(noise))  # 0.1 %
    assert noise.isfinite().all()
    assert 10 < noise[-1] < 24


def assert_independent(a: Tensor, b: Tensor) -> None:
    """No correlation of the values nor of their squares, and not one shared number."""
    for power in (1, 2):
        x, y = a.flatten().double() ** power, b.flatten().double() ** power
        correlation = float(torch.corrcoef(torch.stack([x, y]))[0, 1])
        assert abs(correlation) * math.sqrt(x.numel()) < NormalDist().inv_cdf(1 - 1e-5)
    assert float((a == b).float().mean()) < 1e-3


def noise_of(draw: int = 3, number: int = 1, seed: int = 0, stream: int = 0, position: int = 10) -> Tensor:
    rows = torch.arange(200)
    return gumbel_noise(keys(rows * 7 + draw, number, seed, stream), torch.full((200,), position), 200)


@pytest.mark.parametrize("change", [{"draw": 4}, {"number": 2}, {"seed": 1}, {"stream": 1}, {"position": 11}])
def test_trap_34_whatever_differs_gives_other_noise(change: dict[str, int]) -> None:
    """trap 34: prompts, samples, seeds, validation and training, positions."""
    assert_independent(noise_of(), noise_of(**change))


def test_trap_34_neighbouring_tokens_are_independent() -> None:
    """trap 34"""
    noise = noise_of()
    for distance in (1, 2, 64):
        assert_independent(noise[:, :-distance], noise[:, distance:])


def test_trap_34_no_keys_meet() -> None:
    """trap 34: 2 seeds x 2 streams x 1,000 draws x 16 samples: 64,000 different keys, in both halves of their bits."""
    every = torch.cat([keys(torch.arange(1000)[:, None], torch.arange(16), s, t).flatten() for s in (0, 1) for t in (0, 1)])
    assert len(every.unique()) == 64_000
    # 64,000 of 2^32 values: 0.48 pairs are expected to meet by chance.
    assert len((every & 0xFFFFFFFF).unique()) > 64_000 - 6


def test_trap_34_duplicate_rate_over_ranks_is_as_by_chance() -> None:
    """trap 34: two ranks sample the same prompt distribution (8 tokens of 4 equal logits: 65,536 responses); among 512 x 512 pairs of
    responses 4 are expected to be equal. Shared noise would make it 512."""
    logits = torch.zeros(512, 4)

    def responses(rank: int) -> Tensor:
        row_key = keys(torch.arange(rank, 1024, 2), 0)
        return torch.stack([sample(logits, Sampling(8), row_key, torch.full((512,), t))[0] for t in range(8)], 1)

    code = 4 ** torch.arange(8)
    first, second = ((responses(rank) * code).sum(1) for rank in (0, 1))
    assert int((first[:, None] == second[None, :]).sum()) < 14  # 4 + 5 standard deviations
