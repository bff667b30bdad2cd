"""The hybrid engine against the model's own forward: traps 3, 8, 16, 25, 34; and the hand-over of weights (trap 21).

However the host plans (batch limit, order, pages, stretches of prefill, preemption, shared queue), a row's tokens are those of the model alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.generation import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

import rlhf.rollout.engine as engine_module
from rlhf.config import parse_config
from rlhf.models.forward import response_logprobs
from rlhf.models.loading import eos_token_ids, load_tokenizer
from rlhf.rollout import EngineSettings, HybridEngine
from rlhf.rollout.decoder import LeanDecoder
from rlhf.rollout.generic import GenericDecoder
from rlhf.rollout.loop import DecodeLoop
from rlhf.rollout.paged import PrefillStep, Step
from rlhf.rollout.sampler import row_keys, sample
from rlhf.rollout.schedule import Look, Schedule, Waiting
from rlhf.trainers.rl import check_lengths, engine_settings
from rlhf.types import MicroBatch, Prompt, Rollout, Sampling
from tests.helpers import VOCABULARY, rollout_engine

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


@dataclass
class Watch:
    """What happened inside `generate`, and a cache that is checked at every look of the host."""

    resumed: int = 0  # rows that came back after preemption, with response tokens to be read again
    dropped: int = 0  # times that a group lost its held prefix
    prefilled: int = 0  # tokens through the model in prefill
    looks: int = 0
    most_live: int = 0
    prompt_logits: list[Tensor] = None  # type: ignore[assignment]  # of every forward in prefill that gave some


def check_cache(call: Schedule) -> None:
    """Every page is counted once for each slot that holds it, and is free exactly if none does."""
    cache = call.cache
    held = torch.arange(cache.table.shape[1]) < cache.held[:, None]
    counts = torch.bincount(cache.table[held].long(), minlength=cache.pages)
    assert counts[0] == 0 and cache.table[~held].eq(0).all()
    counts[0] = 1
    assert torch.equal(counts.int(), cache.references)
    free = cache.free[: int(cache.free_count)]
    assert sorted(free.tolist()) == counts.eq(0).nonzero().squeeze(1).tolist()
    live, length = call.state.live[: call.used], call.state.length[: call.used]
    assert (cache.held[: call.used][live] == -(-length[live] // cache.page_size)).all()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    w = Watch(prompt_logits=[])
    prefill, drop, look = Schedule._prefill, Schedule._drop_holder, Schedule._look

    def counted_prefill(self: Schedule, fresh: list[tuple[Waiting, list[int], int]]) -> None:
        w.resumed += sum(waiting.tokens > 1 for waiting, _, _ in fresh)
        prefill(self, fresh)

    def counted_drop(self: Schedule) -> None:
        w.dropped += any(waiting.held for waiting in self.waiting)
        drop(self)

    def checked_look(self: Schedule) -> Look:
        w.looks += 1
        w.most_live = max(w.most_live, int(self.state.live[: self.used].sum()))
        check_cache(self)
        return look(self)

    def spy(decoder: type) -> None:
        forward = decoder.forward

        def counted(self: Any, ids: Tensor, positions: Tensor, step: Step, keep: Tensor | None) -> Tensor | None:
            logits: Tensor | None = forward(self, ids, positions, step, keep)
            if isinstance(step, PrefillStep):
                w.prefilled += len(ids)
                if logits is not None:
                    w.prompt_logits.append(logits)
            return logits

        monkeypatch.setattr(decoder, "forward", counted)

    monkeypatch.setattr(Schedule, "_prefill", counted_prefill)
    monkeypatch.setattr(Schedule, "_drop_holder", counted_drop)
    monkeypatch.setattr(Schedule, "_look", checked_look)
    spy(LeanDecoder)
    spy(GenericDecoder)
    return w


class LaggingSchedule(Schedule):
    """The host's side as it is on a GPU: it plans for blocks of steps, and from the look before the last."""

    def __init__(self, engine: HybridEngine, *rest: Any):
        super().__init__(engine, *rest)
        self.block, self.cuda = engine.settings.look_every, True

    def _look(self) -> Look:
        self.cuda = False  # no pinned memory, no event
        try:
            return super()._look()
        finally:
            self.cuda = True


def plan_as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, the lag, and batches that are rounded up, so that slots of nobody and of ended rows run with the others."""
    monkeypatch.setattr(engine_module, "Schedule", LaggingSchedule)
    monkeypatch.setattr(DecodeLoop, "batch_for", lambda self, used: next(size for size in self.sizes if size >= used))


def generate(engine: HybridEngine, *given: Any, **options: Any) -> Rollout:
    """`engine.generate`; afterwards no page may be in use (page 0 is nobody's)."""
    rollout = engine.generate(*given, **options)
    assert engine._loop is not None
    cache = engine._loop.cache
    assert int(cache.references.sum()) == int(cache.references[0]) == 1
    assert int(cache.free_count) == cache.pages - 1
    assert not cache.held.any()
    return rollout


def one_by_one(
    model: Any, prompt: Prompt, draw: int, number: int, sampling: Sampling = SAMPLING, eos: list[int] = EOS
) -> tuple[list[int], list[float], list[float]]:
    """(token ids, logprobs, entropies). No batch, no cache, no padding: the whole sequence through the model for every token, and what transformers
    makes of its logits."""
    key = row_keys(sampling.seed, sampling.stream, torch.tensor([draw]), torch.tensor([number]))
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.bad_token_ids:
        processors.append(NoBadWordsLogitsProcessor([[token] for token in sampling.bad_token_ids]))
    if sampling.min_new_tokens:
        processors.append(MinNewTokensLengthLogitsProcessor(len(prompt.input_ids), sampling.min_new_tokens, eos))
    ids, logprobs, entropies = list(prompt.input_ids), [], []
    for position in range(sampling.max_new_tokens):
        past = torch.tensor([ids])
        with torch.no_grad():
            logits = processors(past, model(past).logits[:, -1])
        token, logprob = sample(logits, sampling.temperature or 1.0, sampling.temperature > 0, key, torch.tensor([position]))
        ids.append(int(token))
        logprobs.append(float(logprob))
        entropies.append(float(torch.distributions.Categorical(logits=logits / (sampling.temperature or 1.0)).entropy()))
        if ids[-1] in eos:
            break
    return ids[len(prompt.input_ids) :], logprobs, entropies


@pytest.mark.parametrize("family", FAMILIES)
def test_trap_8_rollouts_in_a_batch_are_those_of_single_rows(load: Callable[[str], Any], family: str) -> None:
    """trap 8, trap 25: prompts of 1 to 8 tokens in one batch; token ids equal, logprobs to rounding."""
    model, prompts = load(family), some_prompts(8)
    rollout = rollout_engine(model, max_batch=64).generate(prompts, list(range(40, 48)), 2, SAMPLING)
    found = responses(rollout)
    for i, prompt in enumerate(prompts):
        for number in (0, 1):
            ids, logprobs, _ = one_by_one(model, prompt, 40 + i, number)
            assert found[40 + i, number] == ids
            torch.testing.assert_close(rollout.rollout_logprobs[2 * i + number, : len(ids)], torch.tensor(logprobs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefill_tokens", [5, 16_384])
def test_trap_8_packed_logits_are_the_unpadded_ones(load: Callable[[str], Any], watch: Watch, family: str, prefill_tokens: int) -> None:
    """trap 8: prompts of unlike lengths side by side in one forward, or cut into stretches; the logits after each are those of the prompt alone."""
    model, prompts = load(family), some_prompts(6)
    rollout_engine(model, max_batch=64, prefill_tokens=prefill_tokens).generate(prompts, list(range(6)), 2, Sampling(1))
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([p.input_ids])).logits[:, -1] for p in prompts])
    torch.testing.assert_close(torch.cat(watch.prompt_logits), alone, atol=1e-5, rtol=1e-5)
    assert (len(watch.prompt_logits) == 1) == (prefill_tokens > 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_trap_8_right_padded_scores_are_the_unpadded_ones(load: Callable[[str], Any], family: str) -> None:
    """trap 8, trap 1: the scoring forward on a padded micro-batch against each row alone."""
    model = load(family)
    rollout = rollout_engine(model, max_batch=64).generate(some_prompts(), list(range(12)), 1, SAMPLING)
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
    rollout = rollout_engine(model, max_batch=64).generate(some_prompts(), list(range(12)), 2, Sampling(20, temperature, seed=1))
    batch = MicroBatch(rollout.input_ids, rollout.prompt_lengths, rollout.response_lengths, rollout.response_mask, {})
    mask = rollout.response_mask
    with torch.no_grad():
        right, _ = response_logprobs(model, batch, temperature)
        wrong, _ = response_logprobs(model, batch, temperature * 1.1)
    assert float((right - rollout.rollout_logprobs)[mask].abs().max()) < 1e-4
    assert float((wrong - rollout.rollout_logprobs)[mask].abs().max()) > 0.05


def test_trap_25_a_part_of_the_prompts_gets_the_same_tokens(load: Callable[[str], Any]) -> None:
    """trap 25: as another number of ranks would share them out."""
    model, prompts = load("llama"), some_prompts(9)
    engine = rollout_engine(model, max_batch=64)
    whole = responses(engine.generate(prompts, list(range(9)), 2, SAMPLING))
    for rank in (0, 1):
        assert responses(engine.generate(prompts[rank::2], list(range(9))[rank::2], 2, SAMPLING)).items() <= whole.items()


def test_trap_3_every_eos_ends_and_belongs_to_the_response(load: Callable[[str], Any]) -> None:
    """trap 3: pad = EOS = 3, and 17 ends as well; each is the last token of its response, counts and trains; nothing follows it."""
    rollout = rollout_engine(load("llama"), max_batch=64).generate(some_prompts(20), list(range(20)), 4, Sampling(30, seed=2))
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
    engine, prompts = rollout_engine(load("llama"), max_batch=64), some_prompts(20)
    training = responses(engine.generate(prompts, list(range(20)), 1, Sampling(8, seed=5)))
    validation = responses(engine.generate(prompts, list(range(20)), 1, Sampling(8, seed=5, stream=1)))
    assert sum(training[k] == validation[k] for k in training) <= 3  # by chance: two short ones
    assert len({tuple(ids) for ids in responses(engine.generate([prompts[0]] * 20, list(range(20)), 1, SAMPLING)).values()}) > 15


def test_greedy_rollouts_are_those_of_transformers(load: Callable[[str], Any]) -> None:
    model, prompts = load("llama"), some_prompts(6)
    rollout = rollout_engine(model, max_batch=64).generate(prompts, list(range(6)), 1, Sampling(12, 0.0))
    for row, prompt in enumerate(prompts):
        ids = model.generate(torch.tensor([prompt.input_ids]), do_sample=False, max_new_tokens=12, eos_token_id=EOS, pad_token_id=3)
        assert rollout.response_ids(row) == ids[0, len(prompt.input_ids) :].tolist()


def test_windows_of_one_token_and_ends_at_once(load: Callable[[str], Any]) -> None:
    engine = rollout_engine(load("llama"), range(VOCABULARY), max_batch=64)
    rollout = engine.generate(some_prompts(5), list(range(5)), 1, SAMPLING)
    assert rollout.response_lengths.tolist() == [1] * 5
    assert rollout.finished.all()
    one = rollout_engine(load("llama"), max_batch=64).generate(some_prompts(5), list(range(5)), 1, Sampling(1))
    assert one.response_lengths.tolist() == [1] * 5


def test_a_rank_without_prompts_gets_an_empty_rollout(load: Callable[[str], Any]) -> None:
    rollout = rollout_engine(load("llama"), max_batch=64).generate([], [], 2, SAMPLING)
    assert len(rollout) == 0
    tensors = (rollout.draw, rollout.sample, rollout.input_ids, rollout.prompt_lengths, rollout.response_lengths)
    assert {tensor.dtype for tensor in tensors} == {torch.int64}  # they travel beside other ranks' rows


def test_progress_is_told(load: Callable[[str], Any], watch: Watch) -> None:
    """The launcher takes a rank that is silent for long to be stuck: it beats with every look."""
    beats: list[int] = []
    engine = rollout_engine(load("llama"), beat=lambda: beats.append(1), max_batch=4)
    engine.generate(some_prompts(5), list(range(5)), 2, SAMPLING)
    assert len(beats) >= 20  # ten rows in four slots


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trap_21_the_hand_over_is_complete_or_refused(load: Callable[[str], Any], family: str) -> None:
    """trap 21"""
    model, source, prompts = load(family), load(family), some_prompts(6)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    engine = rollout_engine(model, max_batch=64)
    addresses = {name: tensor.data_ptr() for name, tensor in engine.weights.items()}
    before = responses(engine.generate(prompts, list(range(6)), 2, SAMPLING))
    engine.load_weights(source.named_parameters())
    assert all(torch.equal(parameter, engine.weights[name]) for name, parameter in source.named_parameters())
    assert {name: tensor.data_ptr() for name, tensor in engine.weights.items()} == addresses
    assert engine.parameters == sum(p.numel() for p in model.parameters())
    # What was prepared for the old weights computes with the new ones.
    after = responses(engine.generate(prompts, list(range(6)), 2, SAMPLING))
    assert after == responses(rollout_engine(source, max_batch=64).generate(prompts, list(range(6)), 2, SAMPLING)) != before
    named = list(source.named_parameters())
    with pytest.raises(RuntimeError, match="did not arrive"):
        engine.load_weights(named[:-1])
    with pytest.raises(RuntimeError, match="no place in the rollout's weights"):
        engine.load_weights([*named, ("other", torch.zeros(1))])
    with pytest.raises(RuntimeError, match="no place in the rollout's weights"):
        engine.load_weights([(named[0][0], named[0][1][:-1])])
    with pytest.raises(RuntimeError, match="no place in the rollout's weights"):
        engine.load_weights([*named, named[0]])


# ---- however the host plans (trap 25). Families of the lean decoder and one of the generic; a vocabulary of several blocks of the sampler.

WIDE = 300
ENDS = list(range(3, WIDE, 25))
WINDOW = 24
SMALL: dict[str, Any] = {"vocab_size": WIDE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ROTARY: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2}
WIDE_FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**ROTARY),
    "qwen2": Qwen2Config(**ROTARY, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**ROTARY, head_dim=16),
    "mistral": MistralConfig(**ROTARY, sliding_window=6),
    "gpt2": GPT2Config(vocab_size=WIDE, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2),
}
SAMPLES = 3
WIDE_SAMPLING = Sampling(WINDOW, 1.0, seed=8)


@functools.cache
def wide_model(family: str) -> Any:
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(WIDE_FAMILIES[family], attn_implementation="sdpa").eval()
    with torch.no_grad():  # biases and norms that start at 0 and 1 would hide mistakes
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@functools.cache
def wide_prompts() -> list[Prompt]:
    """Two are equal, so that their rows share one prefill; two fill pages of 4 exactly; one has a single token."""
    generator = torch.Generator().manual_seed(2)
    prompts = [Prompt(torch.randint(4, WIDE, (n,), generator=generator).tolist(), "", "test") for n in (19, 1, 7, 8, 13, 7, 16, 2, 5)]
    prompts[5] = Prompt(prompts[2].input_ids, "", "test")
    return prompts


@functools.cache
def wide_expected(family: str, sampling: Sampling = WIDE_SAMPLING) -> dict[tuple[int, int], tuple[list[int], list[float], list[float]]]:
    model = wide_model(family)
    return {(i, n): one_by_one(model, prompt, i, n, sampling, ENDS) for i, prompt in enumerate(wide_prompts()) for n in range(SAMPLES)}


def assert_expected(rollout: Rollout, family: str, draws: list[int]) -> None:
    """The rows of `draws`, in the order they were asked for, with the tokens and logprobs of the model alone."""
    expected = wide_expected(family)
    names = [(int(d), int(s)) for d, s in zip(rollout.draw, rollout.sample, strict=True)]
    assert names == [(d, s) for d in draws for s in range(SAMPLES)]
    for row, name in enumerate(names):
        ids, logprobs, _ = expected[name]
        assert rollout.prompts[row] is wide_prompts()[name[0]]
        assert rollout.response_ids(row) == ids
        assert bool(rollout.finished[row]) == (ids[-1] in ENDS)
        torch.testing.assert_close(rollout.rollout_logprobs[row, : len(ids)], torch.tensor(logprobs), atol=1e-4, rtol=1e-4)
        assert rollout.rollout_logprobs[row, len(ids) :].eq(0).all()


@dataclass(frozen=True)
class Plan:
    max_batch: int
    page_size: int = 64
    prefill_tokens: int = 16_384
    cache_tokens: int = 0  # 60: one sequence and a little, so that rows are preempted
    shuffled: bool = False
    queue: bool = False  # two engines pull prompts from one queue
    gpu: bool = False


PLANS = {
    "all at once": Plan(64),
    "one slot, stretches, queue": Plan(1, 4, 5, shuffled=True, queue=True),
    "seven slots, stretches": Plan(7, 64, 5, shuffled=True),
    "preempted, seven slots, queue": Plan(7, 4, cache_tokens=60, queue=True),
    "preempted, stretches": Plan(64, 4, 5, 60, shuffled=True),
    "preempted, queue, as on GPU": Plan(64, 4, cache_tokens=60, shuffled=True, queue=True, gpu=True),
    "preempted, seven slots, stretches, as on GPU": Plan(7, 4, 5, 60, gpu=True),
    "one slot, queue, as on GPU": Plan(1, queue=True, gpu=True),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("family", WIDE_FAMILIES)
def test_trap_25_tokens_do_not_depend_on_the_plan(monkeypatch: pytest.MonkeyPatch, watch: Watch, family: str, name: str) -> None:
    """trap 25, trap 8: batch limit, order, page size, stretches of prefill, preemption, a queue shared by two engines, the GPU's blocks and lag."""
    plan, prompts = PLANS[name], wide_prompts()
    settings = {"max_batch": plan.max_batch, "page_size": plan.page_size, "prefill_tokens": plan.prefill_tokens, "cache_tokens": plan.cache_tokens}
    if plan.gpu:
        plan_as_on_gpu(monkeypatch)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(1)).tolist() if plan.shuffled else list(range(len(prompts)))
    asked = [prompts[i] for i in order]
    engine = rollout_engine(wide_model(family), ENDS, look_every=4, **settings)
    told: dict[int, list[int]] = {}

    def hear(row: int, ids: list[int]) -> None:
        assert row not in told
        told[row] = ids

    if plan.queue:
        queue = iter(range(len(order)))
        parts = []
        for most in (5, 99):  # the first engine meets an empty queue after five
            taken: list[int] = []

            def take(taken: list[int] = taken, most: int = most) -> int | None:
                index = next(queue, None) if len(taken) < most else None
                if index is not None:
                    taken.append(index)
                return index

            rollout = generate(engine, asked, order, SAMPLES, WIDE_SAMPLING, take=take, on_finished=hear)
            assert_expected(rollout, family, [order[i] for i in taken])
            parts.append((taken, rollout))
        assert [index for taken, _ in parts for index in taken] == list(range(len(order))) and len(parts[0][0]) == 5
        rows = {
            i * SAMPLES + s: rollout.response_ids(j * SAMPLES + s) for taken, rollout in parts for j, i in enumerate(taken) for s in range(SAMPLES)
        }
    else:
        rollout = generate(engine, asked, order, SAMPLES, WIDE_SAMPLING, on_finished=hear)
        assert_expected(rollout, family, order)
        rows = {row: rollout.response_ids(row) for row in range(len(rollout))}
    assert told == rows  # every row once, with its own tokens
    assert len({len(ids) for ids in rows.values()}) > 5  # rows leave the batch at different times
    assert watch.most_live <= plan.max_batch
    assert (watch.resumed > 3) == (plan.cache_tokens > 0)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(("group", "cache_tokens"), [(64, 0), (20, 52)])
def test_trap_25_a_group_larger_than_the_batch(monkeypatch: pytest.MonkeyPatch, watch: Watch, group: int, cache_tokens: int, gpu: bool) -> None:
    """trap 25: 64 samples of a prompt through 7 slots. The prompt's pages are held for those that wait, and given up where memory is short."""
    if gpu:
        plan_as_on_gpu(monkeypatch)
    model, prompts = wide_model("qwen3"), [wide_prompts()[0], wide_prompts()[3]]
    expected = rollout_engine(model, ENDS, max_batch=128).generate(prompts, [0, 1], group, WIDE_SAMPLING)
    prompt_tokens = sum(len(p.input_ids) for p in prompts)
    assert watch.prefilled == prompt_tokens and watch.dropped == 0
    engine = rollout_engine(model, ENDS, max_batch=7, page_size=4, look_every=4, cache_tokens=cache_tokens)
    rollout = generate(engine, prompts, [0, 1], group, WIDE_SAMPLING)
    assert responses(rollout) == responses(expected)
    assert responses(rollout).items() >= {(0, n): wide_expected("qwen3")[0, n][0] for n in range(SAMPLES)}.items()
    assert (watch.prefilled == 2 * prompt_tokens) == (cache_tokens == 0)
    assert (watch.dropped > 0) == (cache_tokens > 0)


@pytest.mark.parametrize("settings", [{"max_batch": 128}, {"max_batch": 7, "page_size": 4}, {"max_batch": 7, "page_size": 4, "prefill_tokens": 5}])
def test_one_prefill_per_prompt(watch: Watch, settings: dict[str, int]) -> None:
    """Eight samples of a prompt, and equal prompts, share one pass over it, also where a group enters in parts."""
    prompts = wide_prompts()
    generate(rollout_engine(wide_model("llama"), ENDS, **settings), prompts, list(range(len(prompts))), 8, WIDE_SAMPLING)
    assert watch.prefilled == sum(len(ids) for ids in {tuple(p.input_ids) for p in prompts}) < sum(len(p.input_ids) for p in prompts)


def test_most_leaves_prompts_to_other_ranks(watch: Watch) -> None:
    """A rank that may have 4 rows in flight pulls a prompt only when it has room for a row of it."""
    prompts, pulled, ended = wide_prompts(), 0, 0

    def take() -> int | None:
        nonlocal pulled
        assert pulled * SAMPLES - ended < 4  # rows in flight or waiting
        pulled += 1
        return pulled - 1 if pulled <= len(prompts) else None

    def hear(row: int, ids: list[int]) -> None:
        nonlocal ended
        ended += 1

    engine = rollout_engine(wide_model("llama"), ENDS, max_batch=64)
    rollout = generate(engine, prompts, list(range(len(prompts))), SAMPLES, WIDE_SAMPLING, take=take, most=4, on_finished=hear)
    assert_expected(rollout, "llama", list(range(len(prompts))))
    assert watch.most_live == 4


@pytest.mark.parametrize(("share", "expected"), [(0, [0, 0, 0, 0, 0, 0]), (2, [0, 0, 0, 0, 1, 2])])
def test_beyond_its_share_a_rank_takes_one_prompt_at_a_time(monkeypatch: pytest.MonkeyPatch, share: int, expected: list[int]) -> None:
    """So that the rank that happens to look first does not get all that is left. Up to half full it takes freely."""
    steps, taken, prompts = 0, [], wide_prompts()
    step = DecodeLoop.step

    def counted(*given: Any) -> None:
        nonlocal steps
        steps += 1
        step(*given)

    def take() -> int | None:
        taken.append(steps)
        return len(taken) - 1 if len(taken) <= 6 else None

    monkeypatch.setattr(DecodeLoop, "step", counted)
    engine = rollout_engine(wide_model("llama"), ENDS, max_batch=12)
    numbers = list(range(len(prompts)))
    rollout = generate(engine, prompts, numbers, 2, replace(WIDE_SAMPLING, min_new_tokens=5), take=take, share=share)
    assert taken[:6] == expected and len(rollout) == 12


def test_a_rank_that_pulls_nothing_gets_an_empty_rollout() -> None:
    """The other ranks were faster."""
    rollout = generate(rollout_engine(wide_model("llama"), ENDS), wide_prompts(), list(range(9)), 2, WIDE_SAMPLING, take=lambda: None)
    assert len(rollout) == 0
    tensors = (rollout.draw, rollout.sample, rollout.input_ids, rollout.prompt_lengths, rollout.response_lengths)
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


def test_calls_of_one_engine_leave_nothing_behind(watch: Watch) -> None:
    """Longer prompts, a longer window, other options: what is kept from the call before must not show."""
    engine, model, prompts = rollout_engine(wide_model("llama"), ENDS, max_batch=7, page_size=4), wide_model("llama"), wide_prompts()
    draws = list(range(len(prompts)))
    plain = responses(generate(engine, prompts, draws, SAMPLES, WIDE_SAMPLING))
    short = [i for i in draws if len(prompts[i].input_ids) < 9]
    for sampling in (
        replace(WIDE_SAMPLING, max_new_tokens=5, repetition_penalty=1.5),
        replace(WIDE_SAMPLING, entropy=True, top_k=9),
        replace(WIDE_SAMPLING, max_new_tokens=40, repetition_penalty=1.5, stream=1),
        replace(WIDE_SAMPLING, max_new_tokens=1),
    ):
        again = generate(engine, [prompts[i] for i in short], short, 2, sampling)
        fresh = rollout_engine(model, ENDS, max_batch=64).generate([prompts[i] for i in short], short, 2, sampling)
        assert responses(again) == responses(fresh)
        forced = generate(engine, prompts, draws, SAMPLES, sampling, forced=[sampling.max_new_tokens] * 27)
        assert forced.response_lengths.tolist() == [sampling.max_new_tokens] * 27
        assert responses(generate(engine, prompts, draws, SAMPLES, WIDE_SAMPLING)) == plain


# ---- what ends a response, and what it is drawn from


def cramped(monkeypatch: pytest.MonkeyPatch, how: str, **more: Any) -> HybridEngine:
    """Roomy; or with preemption, seven slots, stretches; or so and planned for as on a GPU."""
    if how == "roomy":
        return rollout_engine(wide_model("llama"), ENDS, max_batch=64, **more)
    if how == "as on GPU":
        plan_as_on_gpu(monkeypatch)
    return rollout_engine(wide_model("llama"), ENDS, max_batch=7, page_size=4, prefill_tokens=5, look_every=4, cache_tokens=60, **more)


HOW = ["roomy", "preempted", "as on GPU"]


@pytest.mark.parametrize("how", HOW)
def test_limits_and_forced_lengths(monkeypatch: pytest.MonkeyPatch, watch: Watch, how: str) -> None:
    """Both are each row's own; what is drawn up to there does not change."""
    prompts, expected = wide_prompts(), wide_expected("llama")
    draws, names = list(range(len(prompts))), [(d, s) for d in range(len(prompts)) for s in range(SAMPLES)]
    engine = cramped(monkeypatch, how)
    limits = [(1, 2, 3, 4, 7, 99, 12)[i % 7] for i in range(len(names))]
    rollout = generate(engine, prompts, draws, SAMPLES, WIDE_SAMPLING, limits=limits)
    for row, (name, limit) in enumerate(zip(names, limits, strict=True)):
        ids = expected[name][0]
        assert rollout.response_ids(row) == ids[:limit]
        assert bool(rollout.finished[row]) == (len(ids) <= limit and ids[-1] in ENDS)
    assert rollout.rollout_logprobs.ne(0).sum(1).tolist() == rollout.response_lengths.tolist()
    forced = [(0, 1, WINDOW, 9, WINDOW, 2, 17)[i % 7] for i in range(len(names))]
    told: dict[int, list[int]] = {}
    rollout = generate(engine, prompts, draws, SAMPLES, WIDE_SAMPLING, forced=forced, on_finished=lambda row, ids: told.update({row: ids}))
    through = 0
    for row, (name, length) in enumerate(zip(names, forced, strict=True)):
        ids, found = expected[name][0], rollout.response_ids(row)
        if length == 0:
            assert found == ids
            continue
        assert len(found) == length and found[-1] == ENDS[0] and rollout.finished[row]
        common = min(len(ids), length - 1)
        assert found[:common] == ids[:common]
        through += len(ids) < length - 1
    assert through > 2  # rows that an end token did not end
    assert told == {row: rollout.response_ids(row) for row in range(len(names))}
    assert (watch.resumed > 0) == (how != "roomy")


SHORT = replace(WIDE_SAMPLING, max_new_tokens=16)
SHAPED = {
    "no end before": replace(SHORT, min_new_tokens=9),
    "never": replace(SHORT, bad_token_ids=(*range(0, WIDE, 2), *ENDS[:4])),
    "penalty": replace(SHORT, temperature=0.0, repetition_penalty=1.6),
    "all": replace(SHORT, temperature=1.0, min_new_tokens=5, bad_token_ids=tuple(range(60)), repetition_penalty=1.3, entropy=True),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", SHAPED)
def test_trap_18_rules_are_those_of_transformers_row_by_row(monkeypatch: pytest.MonkeyPatch, watch: Watch, name: str, how: str) -> None:
    """trap 18: which tokens a row has seen and how many it has must follow it from slot to slot, and through preemption."""
    sampling, prompts, expected = SHAPED[name], wide_prompts(), wide_expected("llama", SHAPED[name])
    rollout = generate(cramped(monkeypatch, how), prompts, list(range(len(prompts))), SAMPLES, sampling)
    plain = wide_expected("llama")
    changed = 0
    for row in range(len(rollout)):
        d, s = int(rollout.draw[row]), int(rollout.sample[row])
        ids, logprobs, entropies = expected[d, s]
        assert rollout.response_ids(row) == ids
        torch.testing.assert_close(rollout.rollout_logprobs[row, : len(ids)], torch.tensor(logprobs), atol=1e-4, rtol=1e-4)
        if rollout.entropies is not None:
            torch.testing.assert_close(rollout.entropies[row, : len(ids)], torch.tensor(entropies), atol=1e-4, rtol=1e-4)
        assert not set(ids) & set(sampling.bad_token_ids)
        assert not set(ids[: sampling.min_new_tokens]) & set(ENDS) or not sampling.min_new_tokens
        changed += ids != plain[d, s][0]
    assert changed > 3
    assert (rollout.entropies is not None) == sampling.entropy
    assert (watch.resumed > 0) == (how != "roomy")


@pytest.mark.parametrize("sampling", [Sampling(16, 0.8, seed=1, entropy=True), Sampling(16, 1.0, top_k=20, top_p=0.9, seed=1, entropy=True)])
def test_entropies_are_of_the_distributions_sampled_from(sampling: Sampling) -> None:
    prompts, model = wide_prompts(), wide_model("qwen2")
    rollout = generate(rollout_engine(model, ENDS, max_batch=7), prompts, list(range(len(prompts))), 2, sampling)
    assert rollout.entropies is not None
    for row in range(len(rollout)):
        p, n = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
        with torch.no_grad():
            logits = model(rollout.input_ids[row : row + 1, : p + n]).logits[0, p - 1 : p + n - 1] / sampling.temperature
        if sampling.top_k:
            logits[logits < logits.topk(sampling.top_k).values[:, -1:]] = -torch.inf
        ordered, index = logits.softmax(-1).sort(descending=True)
        out = torch.zeros_like(logits).bool().scatter(-1, index, ordered.cumsum(-1) - ordered >= sampling.top_p)
        least = logits.masked_fill(out, torch.inf).amin(-1, keepdim=True)  # of those that are kept; which of two equals is, rounding decides
        found = []
        for kept in (logits.masked_fill(out, -torch.inf), logits.masked_fill(logits < least - 1e-5, -torch.inf)):
            logs = kept.log_softmax(-1)
            found.append((rollout.entropies[row, :n] + (logs.exp() * logs.clamp(min=-1e9)).sum(-1)).abs())
        assert torch.minimum(*found).max() < 1e-4
        assert rollout.entropies[row, n:].eq(0).all()


@pytest.mark.parametrize("gpu", [False, True])
def test_entropies_up_to_the_end_of_the_window(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    """A row that has filled the window may run on in its slot, unseen: it has no entropy to write."""
    if gpu:
        plan_as_on_gpu(monkeypatch)
    prompts = wide_prompts()
    for window in (1, 3):
        rollout = generate(rollout_engine(wide_model("llama"), [3], max_batch=64), prompts, list(range(9)), 2, Sampling(window, entropy=True))
        assert rollout.entropies is not None
        assert rollout.entropies.gt(0).sum(1).tolist() == rollout.response_lengths.tolist()


def text_of(ids: list[int]) -> str:
    """Tokens of one to three characters: 7 -> "7", 129 -> "129"."""
    return "".join(map(str, ids))


STOPS = ("77", "64", "178", "9128", "03")  # inside a token, over two or three, and in the end tokens 78, 128, 178, 203 (alone or with what precedes)


@pytest.mark.parametrize("how", HOW)
def test_stop_texts(monkeypatch: pytest.MonkeyPatch, watch: Watch, how: str) -> None:
    """A response ends with the token that completes a stop text; rows without one, and what comes before, are as they would have been."""
    prompts, group = wide_prompts(), 12
    draws = list(range(len(prompts)))
    sampling = replace(WIDE_SAMPLING, stop=STOPS)
    whole = generate(rollout_engine(wide_model("llama"), ENDS, max_batch=128), prompts, draws, group, WIDE_SAMPLING)
    told: dict[int, list[int]] = {}

    def hear(row: int, ids: list[int]) -> None:
        assert row not in told
        told[row] = ids

    rollout = generate(cramped(monkeypatch, how, decode_text=text_of), prompts, draws, group, sampling, on_finished=hear)
    kinds = dict.fromkeys(("untouched", "first token", "inside a token", "over tokens", "at the end token", "cut"), 0)
    for row in range(len(whole)):
        ids = whole.response_ids(row)
        end = next((n for n in range(1, len(ids) + 1) if any(stop in text_of(ids[:n]) for stop in STOPS)), None)
        found = rollout.response_ids(row)
        assert found == ids[:end] == told[row]
        assert bool(rollout.finished[row]) == (end is not None or ids[-1] in ENDS)
        torch.testing.assert_close(rollout.rollout_logprobs[row, : len(found)], whole.rollout_logprobs[row, : len(found)], atol=1e-4, rtol=1e-4)
        assert rollout.rollout_logprobs[row, len(found) :].eq(0).all()
        kinds["untouched"] += end is None
        if end is not None:
            inside = any(stop in text_of(ids[end - 1 : end]) for stop in STOPS)
            kinds["first token"] += end == 1
            kinds["inside a token"] += inside
            kinds["over tokens"] += not inside
            kinds["at the end token"] += ids[end - 1] in ENDS
            kinds["cut"] += end < len(ids)
    assert all(kinds.values()), kinds
    assert len(told) == len(whole)
    assert (watch.resumed > 0) == (how != "roomy")


def test_a_stop_text_that_is_found_while_room_is_made(monkeypatch: pytest.MonkeyPatch, watch: Watch) -> None:
    """In a batch so large that one ended row is no reason to close the gap: it must not be taken for one that can be preempted."""
    plan_as_on_gpu(monkeypatch)
    prompts, draws, group = wide_prompts(), list(range(9)), 12
    whole = rollout_engine(wide_model("llama"), ENDS, max_batch=128).generate(prompts, draws, group, WIDE_SAMPLING)
    engine = rollout_engine(wide_model("llama"), ENDS, max_batch=100, page_size=4, look_every=4, cache_tokens=520, decode_text=text_of)
    for first in (1, 2, 3, 4, 5):
        stop = text_of(whole.response_ids(0)[first : first + 3])  # of one row alone
        rollout = generate(engine, prompts, draws, group, replace(WIDE_SAMPLING, stop=(stop,)))
        assert rollout.response_ids(0) == whole.response_ids(0)[: first + 3]
        assert [rollout.response_ids(row) for row in range(1, len(whole))] == [whole.response_ids(row) for row in range(1, len(whole))]
    assert watch.resumed > 0 and watch.most_live > 32


# ---- what is refused


def test_a_cache_for_less_than_one_sequence_is_refused() -> None:
    prompts = wide_prompts()
    engine = rollout_engine(wide_model("llama"), ENDS, page_size=4, cache_tokens=48)
    with pytest.raises(ValueError, match=r"rollout.cache_tokens=48: one sequence of 43 tokens needs at least 52"):
        engine.generate(prompts, list(range(9)), 1, WIDE_SAMPLING)
    enough = rollout_engine(wide_model("llama"), ENDS, page_size=4, cache_tokens=52)
    assert_expected(generate(enough, prompts, list(range(9)), SAMPLES, WIDE_SAMPLING), "llama", list(range(9)))
    starved = rollout_engine(wide_model("llama"), ENDS, memory_fraction=1e-12)
    with pytest.raises(ValueError, match=r"are to be had for the KV cache.*lower rollout.max_new_tokens or data.max_prompt_tokens"):
        starved.generate(prompts, list(range(9)), 1, WIDE_SAMPLING)


def test_more_positions_than_the_model_has_are_refused() -> None:
    engine = rollout_engine(wide_model("gpt2"), ENDS)
    with pytest.raises(ValueError, match=r"gpt2.*128 positions"):
        engine.generate(wide_prompts(), list(range(9)), 1, Sampling(110))


def test_the_recipe_reaches_the_engine(models: Path) -> None:
    """`deterministic` most of all: no kernel may then be chosen by a clock, no size by free memory."""
    recipe = {
        "task": "rl",
        "run_dir": "x",
        "actor": {"path": str(models / "llama")},
        "reward": {"components": {"function": "exact_match"}},
        "data": {"train": {"path": "x.jsonl"}},
        "train": {"steps": 1},
        "rollout": {"max_batch": 3, "cache_tokens": 640, "memory_fraction": 0.25, "prefill_tokens": 99, "max_new_tokens": 8},
        "deepspeed": {"hybrid_engine": {"max_out_tokens": 12}},
    }
    config = parse_config({**recipe, "deterministic": True})
    assert engine_settings(config, 77) == EngineSettings(
        max_batch=3, max_context=77, cache_tokens=640, memory_fraction=0.25, prefill_tokens=99, deterministic=True
    )  # fmt: skip
    assert not engine_settings(parse_config(recipe), 77).deterministic
    assert check_lengths(config, [Prompt([4] * 4, "", "test")], []) == 12
    left_open = config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_batch": "auto"})})
    assert check_lengths(left_open, [Prompt([4] * 4, "", "test")], []) == 12  # before the plan has said
    with pytest.raises(ValueError, match=r"training prompt has 5 tokens.*hybrid_engine.max_out_tokens=12"):
        check_lengths(config, [Prompt([4] * 5, "", "test")], [])


def test_the_cache_leaves_what_others_will_take(load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments that the first optimizer step makes, most of all: else the second rollout makes another cache, and captures its graphs again."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=400_000))

    def pages(to_come: int) -> int:
        engine = rollout_engine(load("llama"), EOS, max_batch=64, page_size=4)
        engine.to_come = lambda: to_come
        engine.generate(some_prompts(2), [0, 1], 1, SAMPLING)
        assert engine._loop is not None
        return engine._loop.cache.pages

    assert pages(100_000) == pages(0) // 2


def test_a_deterministic_cache_is_whole_or_refused(load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100_000))
    small = rollout_engine(load("llama"), EOS, max_batch=64, page_size=4)
    small.generate(some_prompts(2), [0, 1], 1, SAMPLING)  # fewer pages, the same tokens
    with pytest.raises(ValueError, match=r"deterministic=true.*rollout.cache_tokens"):
        rollout_engine(load("llama"), EOS, max_batch=64, page_size=4, deterministic=True).generate(some_prompts(2), [0, 1], 1, SAMPLING)


def test_stop_texts_need_a_way_to_text(load: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="decode_text"):
        rollout_engine(load("llama"), EOS).generate(some_prompts(1), [0], 1, Sampling(4, stop=("x",)))
