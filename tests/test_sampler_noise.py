"""Sampling: the right distribution (traps 17, 18), noise that depends on identity only (trap 25), streams apart (trap 34).

Tokens are drawn in two steps, a block of the vocabulary and a token in it: what concerns the distribution is tested over several blocks, too.
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlhf.config import RolloutConfig, ValidationConfig
from rlhf.rollout.sampler import BLOCK_STREAM, SAMPLE_BLOCK, gumbel_noise, plain, row_keys, sample, shape_logits
from rlhf.types import Sampling
from tests.helpers import draw

V = 12
LOGITS = torch.tensor([0.7, -3.0, 1.5, 0.0, -0.9, 2.0, 0.3, -2.0, 1.0, -0.4, -2.5, -1.3])
LARGEST_FIRST = [5, 2, 8, 0, 6, 3, 9, 4, 11, 7, 10, 1]
WIDE = 300
BLOCKS = torch.randn(WIDE, generator=torch.Generator().manual_seed(4)) * 0.6 + torch.arange(WIDE) // SAMPLE_BLOCK * 0.5  # of unlike weight
ENDS = [3, 130, 290]


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


def frequencies(sampling: Sampling, row_key: Tensor, positions: Tensor, logits: Tensor = LOGITS) -> Tensor:
    token, _ = draw(logits.expand(len(row_key), -1), sampling, row_key, positions)
    return torch.bincount(token, minlength=len(logits))


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
    tokens, logprobs = draw(LOGITS.expand(100, V), Sampling(1, 1.0, top_k, top_p), keys(torch.arange(100), 0), torch.zeros(100, dtype=torch.int64))
    torch.testing.assert_close(logprobs, expected.log()[tokens])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_trap_17_frequencies_over_several_blocks(way: str, temperature: float) -> None:
    """trap 17: of tokens, and of the blocks they are in (a wrong weight of a block is spread thin over its tokens)."""
    expected = (BLOCKS / temperature).softmax(-1)
    counts = frequencies(Sampling(1, temperature), *WAYS[way], BLOCKS)
    assert abs(chi_square(counts, expected)) < 4
    block = torch.arange(WIDE) // SAMPLE_BLOCK
    assert abs(chi_square(torch.bincount(block, counts.double()), torch.bincount(block, expected.double()))) < 4


FILTERS: dict[str, dict[str, Any]] = {
    "top-k": {"top_k": 40},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.2},
    "penalty": {"repetition_penalty": 1.7},
    "bad tokens": {"bad_token_ids": (7, 129, 299)},
    "a bad block": {"bad_token_ids": tuple(range(SAMPLE_BLOCK, 2 * SAMPLE_BLOCK))},
    "no end yet": {"min_new_tokens": 60},
    "the end again": {"min_new_tokens": 1},
    "greedy, penalty": {"temperature": 0.0, "repetition_penalty": 1.7, "bad_token_ids": (7, 129, 299), "min_new_tokens": 60},
    "all": {"temperature": 0.7, "top_k": 90, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3, "bad_token_ids": (7, 129), "min_new_tokens": 60},
}


def processed(logits: Tensor, sampling: Sampling, past: Tensor, new: int) -> Tensor:
    """What transformers' own generation makes of logits [B, V] after `past` [B, T], of which the last `new` tokens are response."""
    s, every = sampling, LogitsProcessorList()
    if s.repetition_penalty != 1:
        every.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    if s.bad_token_ids:
        every.append(NoBadWordsLogitsProcessor([[token] for token in s.bad_token_ids]))
    if s.min_new_tokens:
        every.append(MinNewTokensLengthLogitsProcessor(past.shape[1] - new, s.min_new_tokens, ENDS))
    if s.temperature not in (0, 1):
        every.append(TemperatureLogitsWarper(s.temperature))
    if s.top_k:
        every.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        every.append(TopPLogitsWarper(s.top_p))
    if s.min_p:
        every.append(MinPLogitsWarper(s.min_p))
    return every(past, logits)


def some_past(rows: int) -> tuple[Tensor, Tensor]:
    """(token ids [B, 9] that came before, [B, V] bool: the same as a set)"""
    past = torch.randint(0, WIDE, (rows, 9), generator=torch.Generator().manual_seed(6))
    return past, torch.zeros(rows, WIDE, dtype=torch.bool).scatter_(1, past, True)


@pytest.mark.parametrize("name", FILTERS)
def test_trap_18_filters_are_those_of_transformers(name: str) -> None:
    """trap 18: forbidden tokens are the same, the logits of the others too. Half the logits are negative: a penalty moves those the other way."""
    sampling = Sampling(99, **FILTERS[name])
    logits = torch.randn(64, WIDE, generator=torch.Generator().manual_seed(5)) * 2
    past, seen = some_past(64)
    for new in (1, 8):
        expected = processed(logits, sampling, past, new)
        found = shape_logits(logits, sampling, torch.full((64,), new < sampling.min_new_tokens), torch.tensor(ENDS), seen)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        assert not plain(sampling)
        changed = name != "the end again"  # from the first token on it is allowed
        assert torch.equal(found, logits) != changed


@pytest.mark.parametrize("name", FILTERS)
def test_trap_17_and_18_filtered_frequencies_over_several_blocks(name: str) -> None:
    """trap 17, trap 18: a filter may leave blocks with no token at all; the logprobs are those of what is left."""
    sampling = Sampling(99, **FILTERS[name])
    row_key, positions = keys(torch.arange(N), 3), torch.full((N,), 8)
    past, seen = some_past(1)
    shaped = processed(BLOCKS[None], sampling, past, 8)
    tokens, logprobs = draw(BLOCKS.expand(N, -1), sampling, row_key, positions, seen.expand(N, -1), ENDS)
    expected = shaped[0].softmax(-1)
    if sampling.temperature == 0:
        assert tokens.eq(shaped.argmax()).all()
    else:
        assert abs(chi_square(torch.bincount(tokens, minlength=WIDE), expected)) < 4
    torch.testing.assert_close(logprobs, expected.log()[tokens], atol=1e-5, rtol=1e-5)


def test_min_new_tokens_and_penalty_are_of_each_row() -> None:
    """Rows of a batch are at different tokens and have seen different ones."""
    sampling = Sampling(9, min_new_tokens=4, repetition_penalty=1.5)
    _, seen = some_past(6)
    numbers = torch.arange(6)
    together = shape_logits(BLOCKS.expand(6, -1), sampling, numbers < 4, torch.tensor(ENDS), seen)
    assert together[:, ENDS].isinf().all(1).tolist() == [True] * 4 + [False] * 2
    alone = [shape_logits(BLOCKS[None], sampling, numbers[i : i + 1] < 4, torch.tensor(ENDS), seen[i : i + 1]) for i in range(6)]
    assert torch.equal(together, torch.cat(alone))


def test_trap_18_only_temperature_is_plain() -> None:
    """trap 18: whatever changes the distribution takes the long way; a field that is forgotten there would be ignored."""
    assert plain(Sampling(9, 0.3, seed=4, stream=1)) and plain(Sampling(9, stop=("x",)))
    changes: list[dict[str, Any]] = [*FILTERS.values(), {"entropy": True}]
    assert not any(plain(replace(Sampling(9), **change)) for change in changes)


def test_trap_18_filters_are_for_validation_only() -> None:
    """trap 18"""
    for wrong in ({"top_k": 20}, {"top_p": 0.9}):
        with pytest.raises(ValueError, match=r"trap 18.*they belong in validation"):
            RolloutConfig(**wrong)  # type: ignore[arg-type]
        ValidationConfig(**wrong)  # type: ignore[arg-type]


def test_filters_keep_at_least_one_token_and_leave_rows_alone() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0)])

    def filtered(**change: Any) -> Tensor:
        return shape_logits(logits, Sampling(1, **change), torch.zeros(2, dtype=torch.bool), torch.tensor([3]), None)

    for least in ({"top_p": 1e-6}, {"top_k": 1}, {"min_p": 1.0}):
        assert filtered(**least).isfinite().nonzero().tolist() == [[0, 5], [1, 6]]
    for nothing in ({}, {"top_k": 99}):
        assert torch.equal(filtered(**nothing), logits)
    before = logits.clone()
    filtered(top_k=3, bad_token_ids=(5,), min_new_tokens=1, temperature=0.5)
    assert torch.equal(logits, before)  # the caller's are as they were


def test_greedy_takes_the_largest_logit() -> None:
    token, logprob = draw(LOGITS[None], Sampling(1, 0.0), keys(torch.tensor([1]), 0), torch.tensor([0]))
    assert token.item() == 5
    torch.testing.assert_close(logprob, LOGITS.log_softmax(-1)[5:6])
    # The heaviest block (128 tokens at 0) is not the one with the largest logit.
    logits = torch.full((2, WIDE), -9.0)
    logits[:, :SAMPLE_BLOCK] = 0.0
    logits[0, 298], logits[1, 200] = 1.0, 1.0
    assert draw(logits, Sampling(1, 0.0), keys(torch.arange(2), 0), torch.zeros(2, dtype=torch.int64))[0].tolist() == [298, 200]


def test_trap_25_noise_depends_on_identity_only() -> None:
    """trap 25: a row's noise is the same alone, in a batch, and in another order."""
    row_key, positions = keys(torch.arange(32), torch.arange(32) % 4), torch.arange(32)
    together = gumbel_noise(row_key, positions, torch.arange(100))
    alone = torch.cat([gumbel_noise(row_key[i : i + 1], positions[i : i + 1], torch.arange(100)) for i in range(32)])
    order = torch.randperm(32)
    assert torch.equal(together, alone)
    assert torch.equal(gumbel_noise(row_key[order], positions[order], torch.arange(100)), together[order])
    # A token's noise is the same whatever is asked for beside it: all rows the same tokens, or each row its own.
    assert torch.equal(gumbel_noise(row_key, positions, torch.arange(128))[:, :100], together)
    own = (torch.arange(32)[:, None] * 7 + torch.arange(5)) % 100
    assert torch.equal(gumbel_noise(row_key, positions, own), together.gather(1, own))


def test_trap_25_a_padded_vocabulary_gives_the_same_tokens() -> None:
    """trap 25: rows of the head that can never be sampled, whether they fill the last block or make one more, change nothing."""
    row_key, positions = keys(torch.arange(500), 0), torch.arange(500)
    tokens, logprobs = sample(BLOCKS.expand(500, -1), 1.0, True, row_key, positions)
    for more in (1, 84, 85, 200):
        padded = torch.nn.functional.pad(BLOCKS, (0, more), value=-torch.inf)
        again, logprobs_again = sample(padded.expand(500, -1), 1.0, True, row_key, positions)
        assert torch.equal(tokens, again)
        torch.testing.assert_close(logprobs, logprobs_again)


def test_noise_is_pinned() -> None:
    """A change here changes the samples of every run that was started before."""
    noise = gumbel_noise(keys(torch.tensor([0, 1]), torch.tensor([0, 3]), seed=7, stream=1), torch.tensor([0, 5]), PINNED_INDICES)
    torch.testing.assert_close(noise, torch.tensor(PINNED), atol=1e-5, rtol=0)


def test_tokens_are_pinned() -> None:
    """A change here does, too: of the size of the blocks, or of how block and token are found."""
    tokens, _ = sample(BLOCKS.expand(8, -1), 1.0, True, keys(torch.arange(8), 2, seed=7, stream=1), torch.arange(8))
    assert tokens.tolist() == PINNED_TOKENS


PINNED_INDICES = torch.tensor([0, 1, 2, BLOCK_STREAM, BLOCK_STREAM + 1])
PINNED = [[0.136113, 0.613016, 0.954482, -0.482020, 1.488571], [-0.652618, 0.046892, -0.990818, -1.023073, -0.323755]]
PINNED_TOKENS = [211, 195, 231, 58, 285, 98, 54, 206]


def test_noise_is_gumbel() -> None:
    """Kolmogorov-Smirnov against exp(-exp(-x)); the extremes, which decide at small probabilities, are there too."""
    noise = gumbel_noise(keys(torch.arange(500), 1), torch.zeros(500, dtype=torch.int64), torch.arange(2000)).flatten().double().sort().values
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


def noise_of(draw: int = 3, number: int = 1, seed: int = 0, stream: int = 0, position: int = 10, first: int = 0) -> Tensor:
    rows = torch.arange(200)
    return gumbel_noise(keys(rows * 7 + draw, number, seed, stream), torch.full((200,), position), first + torch.arange(200))


@pytest.mark.parametrize("change", [{"draw": 4}, {"number": 2}, {"seed": 1}, {"stream": 1}, {"position": 11}, {"first": BLOCK_STREAM}])
def test_trap_34_whatever_differs_gives_other_noise(change: dict[str, int]) -> None:
    """trap 34: prompts, samples, seeds, validation and training, positions, blocks and tokens."""
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
        return torch.stack([sample(logits, 1.0, True, row_key, torch.full((512,), t))[0] for t in range(8)], 1)

    code = 4 ** torch.arange(8)
    first, second = ((responses(rank) * code).sum(1) for rank in (0, 1))
    assert int((first[:, None] == second[None, :]).sum()) < 14  # 4 + 5 standard deviations
