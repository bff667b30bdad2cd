"""States in host memory between steps, frozen weights between phases: the same bits, and really gone. On CPU "host" is memory of its own."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf import budget, offload
from rlhf.distributed import World
from rlhf.engine import FrozenEngine, TrainEngine, loading_context
from rlhf.models.loading import load_causal_lm
from rlhf.offload import OffloadedStates, Parked
from rlhf.trainers import run as run_module
from rlhf.trainers.rl import train_rl
from tests.distributed.steps import weights
from tests.distributed.test_engine import causal_engine, forward, settings, train
from tests.helpers import rl_config, run_ranks, save_state, write_jsonl


def states_of(engine: TrainEngine) -> list[Tensor]:
    """Master weights and moments, flat."""
    zero = engine._engine.optimizer
    masters = next(
        getattr(zero, n) for n in dir(zero) if n.endswith(("partitioned_groups_flat", "of_fp32_groups", "groups_flat_partition")) and "fp32" in n
    )
    with engine._states_at_hand():
        return [t.detach().clone() for m in masters for t in (m, *(v for v in zero.optimizer.state[m].values() if isinstance(v, Tensor)))]


def absent(engine: TrainEngine) -> bool:
    """No storage of master weights (where they are not the weights themselves), and no place for parts."""
    states = engine._offloaded
    assert states is not None
    masters = [m for m, kept in zip(states._masters, states._kept, strict=True) if kept is not None]
    return all(m.untyped_storage().nbytes() == 0 and m.numel() > 0 for m in masters) and not states._slots


def run(world: World, models: Path, case: tuple[int, str, bool], offloads: bool, saved: Path | None, loaded: Path | None, lora: bool = False) -> Any:
    """Four clipped AdamW steps, a checkpoint in the middle; or the last two of them, from a checkpoint."""
    stage, dtype, _ = case
    offload.PART = 333  # several parts, and a short one, of every group
    role: dict[str, Any] = {"learning_rate": 0.01, "weight_decay": 0.1, "max_grad_norm": 0.5, "offload": offloads}
    engine = causal_engine(world, models / "llama", stage, dtype, lora, sgd=False, **role)
    if loaded:
        engine.load(loaded)
    gone = [absent(engine)] if offloads else []
    norms = []
    for i in range(2 if loaded else 0, 4):
        norms += train(engine, world)
        gone += [absent(engine)] if offloads else []
        if i == 1 and saved:
            save_state(engine, saved)
            gone += [absent(engine)] if offloads else []
    return {**weights(engine), **{f"state {i}": t for i, t in enumerate(states_of(engine))}}, norms, all(gone)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a), [n for n in a if not torch.equal(a[n], b[n])]


CASES = [(3, "bfloat16", 2), (2, "float32", 1)]
MORE = [(1, "bfloat16", 1), (3, "float32", 1), (2, "bfloat16", 2), (1, "float32", 2)]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(c, marks=pytest.mark.slow) for c in MORE)], ids=lambda c: f"zero{c[0]}-{c[1]}-{c[2]}")
def test_offloaded_states_train_the_same_bits(models: Path, tmp_path: Path, case: tuple[int, str, int]) -> None:
    """Weights, master weights, moments and norms; checkpoints go from one to the other."""
    ranks, plain, sent = case[2], tmp_path / "plain", tmp_path / "sent"
    straight = run_ranks(run, ranks, models, case, False, plain, None)
    offloaded = run_ranks(run, ranks, models, case, True, sent, None)
    resumed = run_ranks(run, ranks, models, case, True, None, plain)
    back = run_ranks(run, ranks, models, case, False, None, sent)
    for rank in range(ranks):
        expected, norms, _ = straight[rank]
        assert min(norms) > 0.5  # clipped
        assert len([n for n in expected if n.startswith("state")]) % 4 == 0  # master, step, two moments
        for found, their_norms, gone in (offloaded[rank], resumed[rank], back[rank]):
            assert gone
            assert their_norms == norms[-len(their_norms) :]
            assert_same(found, expected)


def adapters(world: World, models: Path, offloads: bool) -> Any:
    return run(world, models, (2, "bfloat16", False), offloads, None, None, lora=True)


def test_adapters_too(models: Path) -> None:
    straight, offloaded = (run_ranks(adapters, 1, models, o)[0] for o in (False, True))
    assert offloaded[2]
    assert_same(offloaded[0], straight[0])


# ---- the mechanism


def test_parts_are_stepped_in_the_order_in_which_they_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group left out would be given the states of another: refused."""
    monkeypatch.setattr(offload, "PART", 4)
    masters = [torch.zeros(10, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.AdamW(masters)
    OffloadedStates(optimizer, [(m, torch.zeros(10)) for m in masters], torch.device("cpu"))
    masters[1].grad = torch.ones(10)
    with pytest.raises(RuntimeError, match="another order"):
        optimizer.step()


def test_a_step_that_failed_halfway_is_not_gone_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first part is stepped, the second not: another step would step the first twice, and a checkpoint would hold it."""
    monkeypatch.setattr(offload, "PART", 4)
    master = torch.ones(10, requires_grad=True)
    optimizer = torch.optim.AdamW([master])
    states = OffloadedStates(optimizer, [(master, torch.zeros(10))], torch.device("cpu"))
    calls, apply = [], states._apply

    def failing() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        apply()

    states._apply = failing  # type: ignore[assignment]
    states.begin()
    master.grad = torch.ones(10)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    states.abandon()
    with pytest.raises(RuntimeError, match="partly stepped; start again"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="partly stepped"), states.at_hand():
        pass


def test_at_most_so_many_parts_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "PART", 4)
    master = torch.zeros(40, requires_grad=True)
    optimizer = torch.optim.AdamW([master])
    states = OffloadedStates(optimizer, [(master, torch.zeros(40))], torch.device("cpu"))
    for _ in range(2):
        states.begin()
        master.grad = torch.ones(40)
        optimizer.step()
        assert [sum(t.numel() for t in slot.tensors.values()) for slot in states._slots] == [3 * 4] * offload.SLOTS
        master.grad = None
        states.finish()
        assert master.untyped_storage().nbytes() == 0 and master.numel() == 40


# ---- what is frozen


def scored(world: World, models: Path, stage: int, offloads: bool) -> tuple[list[Tensor], list[int]]:
    """Logits of three phases, and the bytes that the weights' storages hold before, in and after each."""
    resolved = settings(stage, world, trained=False)
    from rlhf.config import ModelConfig

    role = ModelConfig(path=models / "llama", dtype="float32", offload=offloads)
    module = load_causal_lm(role, "reference", loading_context(resolved, world), world, torch.float32)
    engine = FrozenEngine(module, resolved, world, role.offload)
    held = [getattr(p, "ds_tensor", p.data) for p in module.parameters()]
    found, sizes = [], []
    for phase in range(3):
        sizes.append(sum(t.untyped_storage().nbytes() for t in held))
        if phase == 1:
            engine.fetch()
        found += [forward(engine).clone() for _ in range(2)]
        sizes.append(sum(t.untyped_storage().nbytes() for t in held))
        engine.release()
    return found, sizes


@pytest.mark.parametrize(("stage", "ranks"), [(3, 2), (3, 1), (0, 1)])
def test_frozen_weights_are_there_in_their_phase_only(models: Path, stage: int, ranks: int) -> None:
    plain, parked = (run_ranks(scored, ranks, models, stage, o) for o in (False, True))
    for (expected, whole), (logits, sizes) in zip(plain, parked, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))
        assert whole == [whole[0]] * 6 and sizes == [0, whole[0]] * 3


def test_tied_weights_are_parked_once() -> None:
    module = nn.Linear(4, 4)
    tied = Parked([module.weight, module.weight.view(-1), module.bias], torch.device("cpu"))
    assert tied.nbytes == 80 and module.weight.untyped_storage().nbytes() == 0
    tied.wait()
    tied.wait()
    assert module.weight.untyped_storage().nbytes() == 64


# ---- the loop


def whole_run(world: World, models: Path, folder: Path, offloads: bool | str) -> dict[str, bytes]:
    data = write_jsonl(folder / f"prompts-{world.rank}.jsonl", [{"prompt": f"w{i} w5 w6", "answer": "w7"} for i in range(4, 10)])
    key = {"offload": offloads}
    config = rl_config(
        models,
        3,
        sgd=False,
        run_dir=folder / f"run-{offloads}",
        actor={**key, "learning_rate": 0.01, "max_grad_norm": 0.1},
        critic={**key, "learning_rate": 0.01, "max_grad_norm": 0.1},
        reference={**key, "path": models / "reference"},
        reward={"components": [{"model": {**key, "path": models / "scalar", "dtype": "float32"}}]},
        algorithm={"kl": {"coef": 0.1}, "epochs": 2},
        data={"train": [{"path": data}]},
        rollout={"prompts": 4, "group_size": 2, "max_new_tokens": 6, "cache_tokens": 2048},
        train={"steps": 2, "micro_batch": 3},
    )
    if offloads == "auto":  # as on a GPU without any room
        run_module.device_capacity, budget.WORTH_SENDING = lambda: 1, 0
    with ExitStack() as cleanup:
        train_rl(config, world, "never", cleanup)
    if offloads == "auto":
        values = json.loads((config.run_dir / budget.BUDGET).read_text())[budget.CHOSEN]
        sections = ("actor", "critic", "reference", "reward.components.0.model")
        assert values == {f"{section}.offload": True for section in sections}
    return {p.name: p.read_bytes() for p in (folder / f"run-{offloads}" / "checkpoints").rglob("*.safetensors")}


@pytest.mark.slow
def test_the_loop_computes_the_same_bits(models: Path, tmp_path: Path) -> None:
    """PPO with all four models under ZeRO-3."""
    plain, sent, auto = (run_ranks(whole_run, 2, models, tmp_path, o)[0] for o in (False, True, "auto"))
    assert plain and sent == plain and auto == plain
