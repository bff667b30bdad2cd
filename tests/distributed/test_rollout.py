"""The hybrid engine on two ranks: weights handed over (trap 21), prompts shared out (trap 25), and ranks of very different length."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

import rlhf.engine as engine_module
from rlhf.distributed import World
from rlhf.experience import gather_rollout
from rlhf.models.lora import WeightSource, weight_layout
from rlhf.rollout import EngineSettings, HybridEngine
from rlhf.types import Prompt, Sampling
from tests.distributed.test_engine import causal_engine, train
from tests.helpers import VOCABULARY, run_ranks


def rollout_engine(models: Path, name: str, world: World, **settings: Any) -> HybridEngine:
    config = AutoConfig.from_pretrained(models / name)
    engine = HybridEngine(config, [3], 3, EngineSettings(**settings), world.device, torch.float32, beat=world.beat)
    with torch.no_grad():
        for i, tensor in enumerate(engine.own_weights().values()):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i)) * 0.3)
    return engine


# ---- trap 21


def take_over(world: World, models: Path, name: str, stage: int, lora: bool, damage: str) -> tuple[bool, bool, str]:
    engine = causal_engine(world, models / name, stage, lora=lora, learning_rate=0.5)
    hybrid = rollout_engine(models, name, world)
    layout = weight_layout(engine.module)
    train(engine, world, 1)
    before = {n: t.clone() for n, t in engine.full_tensors(layout)}
    addresses = [t.data_ptr() for t in hybrid.own_weights().values()]
    if damage == "merge":
        merge = WeightSource.merge
        WeightSource.merge = lambda self, a, b, *rest: merge(self, a, 1.1 * b, *rest)  # type: ignore[method-assign]
    if damage in ("shards", "adapters", "weights"):
        whole = World.gather_shards
        calls: list[int] = []

        def damaged(self: World, pairs: Any, *rest: Any) -> Any:
            arrived = list(whole(self, pairs, *rest))
            calls.append(len(pairs))
            for out, _ in pairs if damage == "shards" or len(calls) == 1 + (damage == "weights") else []:  # adapters come first
                out[-1] += 1  # belongs to the last rank
            return iter(arrived)

        World.gather_shards = damaged  # type: ignore[method-assign]
    hybrid.take_over(lambda weights: engine.gather_into(layout, weights))
    equal = all(torch.equal(before[n], view) for n, view in hybrid.weights.items()) and before.keys() == hybrid.weights.keys()
    message = ""
    try:
        hybrid.generate([Prompt([5, 6], "", "test")], [0], 1, Sampling(2))
    except RuntimeError as error:
        message = str(error)
    world.barrier()  # rank 0 has the store that the other may still look at
    untouched = all(torch.equal(before[n], t) for n, t in engine.full_tensors(layout))  # merging must not reach the training weights
    return equal, untouched and addresses == [t.data_ptr() for t in hybrid.weights.values()], message


@pytest.mark.parametrize(
    ("name", "stage", "lora"),
    [
        ("llama", 3, False),
        ("llama", 2, True),
        ("llama_untied", 0, False),
        ("gpt2", 3, True),
        ("gpt2", 1, False),
        ("qwen2", 3, True),
        ("qwen2", 2, False),
    ],
)
def test_trap_21_shards_arrive_whole_and_merged(models: Path, name: str, stage: int, lora: bool) -> None:
    """trap 21: equal to the gathered and merged tensors bit for bit, at the same addresses as ever, tied heads and biases included."""
    for equal, kept, message in run_ranks(take_over, 2, models, name, stage, lora, ""):
        assert equal
        assert kept
        assert message == ""


def test_trap_21_merged_where_shards_end_inside_a_row(models: Path) -> None:
    """trap 21: a third of a matrix is no number of rows."""
    assert all(found == (True, True, "") for found in run_ranks(take_over, 3, models, "llama", 3, True, ""))


def in_another_dtype(world: World, models: Path, held: str, wanted: torch.dtype) -> tuple[int, float]:
    engine = causal_engine(world, models / "llama", 3, held, lora=True, learning_rate=0.5)
    train(engine, world, 1)
    layout = weight_layout(engine.module)
    expected = {name: tensor.float() for name, tensor in engine.full_tensors(layout)}
    weights = {name: torch.empty_like(tensor, dtype=wanted) for name, tensor in expected.items()}
    wrong = int(engine.gather_into(layout, weights))
    return wrong, max(float((weights[n].float() - t).norm() / t.norm()) for n, t in expected.items())


@pytest.mark.parametrize(("held", "wanted"), [("float32", torch.bfloat16), ("bfloat16", torch.float32)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_trap_21_merged_into_another_dtype(models: Path, ranks: int, held: str, wanted: torch.dtype) -> None:
    """trap 21: a shard that cannot leave as it is is merged all the same."""
    for wrong, distance in run_ranks(in_another_dtype, ranks, models, held, wanted):
        assert wrong == 0 and distance < 0.005


def test_trap_21_a_wrong_element_stops_the_rollout(models: Path) -> None:
    """trap 21: what arrived is compared with the shard that a rank holds itself."""
    messages = [message for _, _, message in run_ranks(take_over, 2, models, "llama", 3, False, "shards")]
    assert "trap 21" in messages[1]  # the last element of a tensor is the last rank's


@pytest.mark.parametrize("damage", ["adapters", "weights"])
def test_trap_21_a_wrong_adapter_or_merge_stops_the_rollout(models: Path, damage: str) -> None:
    """trap 21: what was gathered to be merged is compared too, for a merge of wrong adapters is right in itself; and what was merged."""
    messages = [message for _, _, message in run_ranks(take_over, 2, models, "llama", 3, True, damage)]
    assert "trap 21" in messages[1]


@pytest.mark.parametrize("gap", [0, 3])
def test_copies_of_neighbours_become_one(gap: int) -> None:
    """Every tensor arrives, and nothing between or behind them is touched, whether or not they follow each other."""
    generator = torch.Generator().manual_seed(gap)
    sizes = [5, 2 << 20, 7, 1, 1 << 20, 9]
    source, target = (torch.randn(sum(sizes) + 40, generator=generator) for _ in range(2))
    before, expected, copies, at = target.clone(), target.clone(), [], 1
    for i, size in enumerate(sizes):
        there = at + gap * (i % 2)
        copies.append((target[there : there + size].view(1, size), source[at : at + size]))
        expected[there : there + size] = source[at : at + size]
        at = there + size
    other = torch.zeros(4, dtype=torch.bfloat16)
    pairs, again = [*copies, (other.view(2, 2), torch.ones(4))], engine_module.Copies()
    for _ in range(2):  # the second time they are begun before they are known
        target[:] = before
        other.zero_()
        again.start()
        again.finish(pairs)
        assert torch.equal(target, expected) and torch.equal(other, torch.ones(4, dtype=torch.bfloat16))
    moved = [(t, s.clone()) for t, s in pairs]
    for _, s in moved:
        s.add_(1)
    again.start()
    again.finish(moved)  # other addresses
    assert all(torch.equal(t.flatten().float(), s) for t, s in moved)


def turns(world: World, models: Path) -> list[int]:
    engine, seen = causal_engine(world, models / "llama", 3, learning_rate=0.5), []
    engine_module.gather_into = lambda layout, weights, world, turn, copies: seen.append(turn)  # type: ignore[assignment]
    for _ in range(3):
        train(engine, world, 4)
        engine.gather_into([], {})
    return seen


def test_trap_21_every_tensor_gets_its_turn(models: Path) -> None:
    """trap 21: which tensors are compared moves on with each hand-over, however many optimizer steps lie between two."""
    assert run_ranks(turns, 1, models) == [[1, 2, 3]]


@pytest.mark.parametrize("stage", [2, 3])
def test_trap_21_a_wrong_merge_stops_the_rollout(models: Path, stage: int) -> None:
    """trap 21: rows of what was merged are compared with base and adapter."""
    for _, _, message in run_ranks(take_over, 2, models, "llama", stage, True, "merge"):
        assert "trap 21" in message


# ---- prompts shared out


def skewed(count: int) -> tuple[list[Prompt], list[int]]:
    """Prompts, and response lengths that alternate between very long and very short."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY, (count, 3), generator=generator).tolist()
    return [Prompt(row, "", "test") for row in ids], [60 if i % 2 == 0 else 2 for i in range(count)]


def pull(world: World, models: Path, queue: bool, slow: float, count: int) -> tuple[dict[int, list[int]], int, float]:
    """(draw -> response, own rows, busy seconds)"""
    hybrid = rollout_engine(models, "llama", world, max_batch=8, page_size=16)
    prompts, lengths = skewed(count)
    hybrid.generate(prompts[:2], [0, 1], 1, Sampling(60))  # warm
    world.barrier()
    started = time.monotonic()

    def dawdle(row: int, ids: list[int]) -> None:
        time.sleep(slow * world.rank)

    if queue:
        local = hybrid.generate(
            prompts, list(range(count)), 1, Sampling(60, seed=1), take=world.shared_queue(count), most=4, forced=lengths, on_finished=dawdle
        )
    else:
        mine = list(range(world.rank, count, 2))
        local = hybrid.generate([prompts[i] for i in mine], mine, 1, Sampling(60, seed=1), forced=[lengths[i] for i in mine], on_finished=dawdle)
    busy = time.monotonic() - started
    world.wait_for_all("rollout")
    rollout = gather_rollout(local, dict(enumerate(prompts)), world)
    return {int(d): rollout.response_ids(i) for i, d in enumerate(rollout.draw)}, len(local), busy


def test_trap_25_queue_and_plan_give_the_same_tokens(models: Path) -> None:
    """trap 25; and a rank that is held up takes fewer prompts, while the plan gives every rank its half."""
    queued = run_ranks(pull, 2, models, True, 0.15, 40)
    planned = run_ranks(pull, 2, models, False, 0.0, 40)
    assert queued[0][0] == queued[1][0] == planned[0][0]
    assert len(queued[0][0]) == 40
    assert [rows for _, rows, _ in planned] == [20, 20]
    assert queued[0][1] + queued[1][1] == 40
    assert queued[1][1] < 16


@pytest.mark.slow
def test_the_queue_keeps_both_ranks_busy(models: Path) -> None:
    """A plan gives rank 0 all the long responses. With the queue both ranks are done within 10 % of each other."""
    times = sorted(busy for _, _, busy in run_ranks(pull, 2, models, True, 0.0, 600, timeout=100))
    planned = sorted(busy for _, _, busy in run_ranks(pull, 2, models, False, 0.0, 600, timeout=100))
    assert times[1] < 1.1 * times[0]
    assert planned[1] > 2 * planned[0]


# ---- no hang


def uneven(world: World, models: Path) -> tuple[int, float]:
    """Rank 0 ends at once, rank 1 decodes for longer than the group's timeout."""
    prompts, _ = skewed(2)
    hybrid = rollout_engine(models, "llama", world, max_batch=2)
    slow = 0.6 * world.rank
    hybrid.beat = lambda: time.sleep(slow)  # once for every decode step
    started = time.monotonic()
    local = hybrid.generate(prompts[world.rank :][:1], [world.rank], 1, Sampling(12), forced=[12 if world.rank else 1])
    world.wait_for_all("rollout")
    rollout = gather_rollout(local, dict(enumerate(prompts)), world)
    return int(rollout.response_lengths.sum()), time.monotonic() - started


def test_a_rank_that_waits_does_not_hang_or_time_out(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The waiting is on the store, not in a collective: a group timeout of 3 seconds does not see 6 seconds of it."""
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "0.05")
    found: list[tuple[Tensor, float]] = run_ranks(uneven, 2, models)
    assert [int(tokens) for tokens, _ in found] == [13, 13]
    assert all(seconds > 5 for _, seconds in found)
