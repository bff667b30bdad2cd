"""The hybrid engine against the model's own forward: traps 3, 8, 16, 25, 34; and the hand-over of weights (trap 21)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from rlhf.models.forward import response_logprobs
from rlhf.models.loading import eos_token_ids, load_tokenizer
from rlhf.rollout import HybridEngine
from rlhf.rollout.sampler import row_keys, sample
from rlhf.types import MicroBatch, Prompt, Rollout, Sampling
from tests.helpers import VOCABULARY

FAMILIES = ["llama", "qwen2", "gpt2"]
EOS = [3, 17]
SAMPLING = Sampling(20, 1.0, seed=5)


@pytest.fixture(scope="module")
def load(models: Path) -> Callable[[str], Any]:
    return lambda name: AutoModelForCausalLM.from_pretrained(models / name, attn_implementation="sdpa").eval()


def some_prompts(count: int = 12) -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    return [Prompt(torch.randint(4, VOCABULARY, (n,), generator=generator).tolist(), "", "test") for n in lengths]


def responses(rollout: Rollout) -> dict[tuple[int, int], list[int]]:
    return {(int(d), int(s)): rollout.response_ids(i) for i, (d, s) in enumerate(zip(rollout.draw, rollout.sample, strict=True))}


def one_by_one(model: Any, prompt: Prompt, draw: int, number: int, sampling: Sampling = SAMPLING) -> tuple[list[int], list[float]]:
    """No batch, no cache, no padding: the whole sequence through the model for every token."""
    key = row_keys(sampling.seed, sampling.stream, torch.tensor([draw]), torch.tensor([number]))
    ids, logprobs = list(prompt.input_ids), []
    for position in range(sampling.max_new_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[:, -1]
        token, logprob = sample(logits, sampling, key, torch.tensor([position]))
        ids.append(int(token))
        logprobs.append(float(logprob))
        if ids[-1] in EOS:
            break
    return ids[len(prompt.input_ids) :], logprobs


@pytest.mark.parametrize("family", FAMILIES)
def test_trap_8_rollouts_in_a_batch_are_those_of_single_rows(load: Callable[[str], Any], family: str) -> None:
    """trap 8, trap 25: prompts of 1 to 8 tokens in one left-padded batch; token ids equal, logprobs to rounding."""
    model, prompts = load(family), some_prompts(8)
    rollout = HybridEngine(model, EOS, 3, 64).generate(prompts, list(range(40, 48)), 2, SAMPLING)
    found = responses(rollout)
    for i, prompt in enumerate(prompts):
        for number in (0, 1):
            ids, logprobs = one_by_one(model, prompt, 40 + i, number)
            assert found[40 + i, number] == ids
            torch.testing.assert_close(rollout.rollout_logprobs[2 * i + number, : len(ids)], torch.tensor(logprobs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_trap_8_left_padded_logits_are_the_unpadded_ones(load: Callable[[str], Any], family: str) -> None:
    """trap 8"""
    model, prompts = load(family), some_prompts(6)
    engine = HybridEngine(model, EOS, 3, 64)
    with torch.no_grad():
        _, logits = engine._prefill(list(range(6)), prompts, torch.zeros(6, dtype=torch.int64))
        alone = torch.cat([model(torch.tensor([p.input_ids])).logits[:, -1] for p in prompts])
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_trap_8_right_padded_scores_are_the_unpadded_ones(load: Callable[[str], Any], family: str) -> None:
    """trap 8, trap 1: the scoring forward on a padded micro-batch against each row alone."""
    model = load(family)
    rollout = HybridEngine(model, EOS, 3, 64).generate(some_prompts(), list(range(12)), 1, SAMPLING)
    batch = MicroBatch(rollout.input_ids, rollout.prompt_lengths, rollout.response_lengths, rollout.response_mask, {})
    with torch.no_grad():
        logprobs, _ = response_logprobs(model, batch, 1.0)
        for row in range(len(rollout)):
            p, n = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
            ids = rollout.input_ids[row, : p + n]
            expected = model(ids[None]).logits[0].log_softmax(-1)[torch.arange(p - 1, p + n - 1), ids[p:]]
            torch.testing.assert_close(logprobs[row, :n], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_trap_16_rollout_logprobs_are_the_scores_at_the_same_temperature(load: Callable[[str], Any], temperature: float) -> None:
    """trap 16, trap 9: the sampler's logprobs and the update's agree at the sampling temperature, and only there."""
    model = load("llama")
    rollout = HybridEngine(model, EOS, 3, 64).generate(some_prompts(), list(range(12)), 2, Sampling(20, temperature, seed=1))
    batch = MicroBatch(rollout.input_ids, rollout.prompt_lengths, rollout.response_lengths, rollout.response_mask, {})
    mask = rollout.response_mask
    with torch.no_grad():
        right, _ = response_logprobs(model, batch, temperature)
        wrong, _ = response_logprobs(model, batch, temperature * 1.1)
    assert float((right - rollout.rollout_logprobs)[mask].abs().max()) < 1e-4
    assert float((wrong - rollout.rollout_logprobs)[mask].abs().max()) > 0.05


@pytest.mark.parametrize("max_batch", [1, 7, 64])
def test_trap_25_tokens_do_not_depend_on_batch_limit_or_order(load: Callable[[str], Any], max_batch: int) -> None:
    """trap 25"""
    model, prompts = load("llama"), some_prompts(20)
    expected = responses(HybridEngine(model, EOS, 3, 60).generate(prompts, list(range(20)), 3, SAMPLING))
    assert len({len(ids) for ids in expected.values()}) > 5  # rows leave the batch at different times
    order = torch.randperm(20, generator=torch.Generator().manual_seed(max_batch)).tolist()
    shuffled = HybridEngine(model, EOS, 3, max_batch).generate([prompts[i] for i in order], order, 3, SAMPLING)
    assert responses(shuffled) == expected


def test_trap_25_a_part_of_the_prompts_gets_the_same_tokens(load: Callable[[str], Any]) -> None:
    """trap 25: as another number of ranks would share them out."""
    model, prompts = load("llama"), some_prompts(9)
    engine = HybridEngine(model, EOS, 3, 64)
    whole = responses(engine.generate(prompts, list(range(9)), 2, SAMPLING))
    for rank in (0, 1):
        assert responses(engine.generate(prompts[rank::2], list(range(9))[rank::2], 2, SAMPLING)).items() <= whole.items()


def test_trap_3_every_eos_ends_and_belongs_to_the_response(load: Callable[[str], Any]) -> None:
    """trap 3: pad = EOS = 3, and 17 ends as well; each is the last token of its response, counts and trains; nothing follows it."""
    rollout = HybridEngine(load("llama"), EOS, 3, 64).generate(some_prompts(20), list(range(20)), 4, Sampling(30, seed=2))
    ends = set()
    for row in range(len(rollout)):
        ids = rollout.response_ids(row)
        assert bool(rollout.finished[row]) == (ids[-1] in EOS)
        assert not set(ids[:-1]) & set(EOS)
        assert len(ids) == 30 or rollout.finished[row]
        ends.add(ids[-1])
        p, n = int(rollout.prompt_lengths[row]), len(ids)
        assert rollout.input_ids[row, p + n :].eq(3).all()
        assert rollout.rollout_logprobs[row, :n].lt(0).all()
        assert rollout.rollout_logprobs[row, n:].eq(0).all()
        assert rollout.response_mask[row].tolist() == [True] * n + [False] * (30 - n)
    assert set(EOS) < ends  # both did end some, and the window cut others


def test_trap_3_all_end_tokens_are_found(models: Path, tmp_path: Path) -> None:
    """trap 3: of the tokenizer, of generation_config (a number or a list), of the recipe."""
    tokenizer = load_tokenizer(models / "llama")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 3
    assert eos_token_ids(tmp_path, tokenizer, []) == [3]
    GenerationConfig(eos_token_id=[17, 3, 20]).save_pretrained(tmp_path)
    assert eos_token_ids(tmp_path, tokenizer, [9]) == [3, 9, 17, 20]
    GenerationConfig(eos_token_id=8).save_pretrained(tmp_path)
    assert eos_token_ids(tmp_path, tokenizer, []) == [3, 8]


def test_trap_34_validation_does_not_repeat_training(load: Callable[[str], Any]) -> None:
    """trap 34: the same prompts, draws and seed on the other stream."""
    engine, prompts = HybridEngine(load("llama"), EOS, 3, 64), some_prompts(20)
    training = responses(engine.generate(prompts, list(range(20)), 1, Sampling(8, seed=5)))
    validation = responses(engine.generate(prompts, list(range(20)), 1, Sampling(8, seed=5, stream=1)))
    assert sum(training[k] == validation[k] for k in training) <= 3  # by chance: two short ones
    assert len({tuple(ids) for ids in responses(engine.generate([prompts[0]] * 20, list(range(20)), 1, SAMPLING)).values()}) > 15


def test_greedy_rollouts_are_those_of_transformers(load: Callable[[str], Any]) -> None:
    model, prompts = load("llama"), some_prompts(6)
    rollout = HybridEngine(model, EOS, 3, 64).generate(prompts, list(range(6)), 1, Sampling(12, 0.0))
    for row, prompt in enumerate(prompts):
        ids = model.generate(torch.tensor([prompt.input_ids]), do_sample=False, max_new_tokens=12, eos_token_id=EOS, pad_token_id=3)
        assert rollout.response_ids(row) == ids[0, len(prompt.input_ids) :].tolist()


def test_windows_of_one_token_and_ends_at_once(load: Callable[[str], Any]) -> None:
    engine = HybridEngine(load("llama"), list(range(VOCABULARY)), 3, 64)
    rollout = engine.generate(some_prompts(5), list(range(5)), 1, SAMPLING)
    assert rollout.response_lengths.tolist() == [1] * 5
    assert rollout.finished.all()
    one = HybridEngine(load("llama"), EOS, 3, 64).generate(some_prompts(5), list(range(5)), 1, Sampling(1))
    assert one.response_lengths.tolist() == [1] * 5


def test_a_rank_without_prompts_gets_an_empty_rollout(load: Callable[[str], Any]) -> None:
    rollout = HybridEngine(load("llama"), EOS, 3, 64).generate([], [], 2, SAMPLING)
    assert len(rollout) == 0
    tensors = (rollout.draw, rollout.sample, rollout.input_ids, rollout.prompt_lengths, rollout.response_lengths)
    assert {tensor.dtype for tensor in tensors} == {torch.int64}  # they travel beside other ranks' rows


def test_progress_is_told(load: Callable[[str], Any]) -> None:
    heard: list[int] = []
    beats: list[int] = []
    engine = HybridEngine(load("llama"), EOS, 3, 4, beat=lambda: beats.append(1))
    engine.generate(some_prompts(5), list(range(5)), 2, SAMPLING, heard.append)
    assert heard == [4, 8, 10]
    assert beats


def test_trap_21_the_hand_over_is_complete_or_refused(load: Callable[[str], Any]) -> None:
    """trap 21"""
    source, replica = load("reference"), load("llama")
    engine = HybridEngine(replica, EOS, 3, 64)
    addresses = [p.data_ptr() for p in replica.parameters()]
    engine.load_weights(source.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), replica.parameters(), strict=True))
    assert [p.data_ptr() for p in replica.parameters()] == addresses
    named = list(source.named_parameters())
    with pytest.raises(RuntimeError, match="did not arrive"):
        engine.load_weights(named[:-1])
    with pytest.raises(RuntimeError, match="no place in the replica"):
        engine.load_weights([*named, ("other", torch.zeros(1))])
    with pytest.raises(RuntimeError, match="no place in the replica"):
        engine.load_weights([(named[0][0], named[0][1][:-1])])
