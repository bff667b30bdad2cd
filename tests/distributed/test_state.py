"""What a checkpoint keeps of an engine: whole, and for any number of ranks and any ZeRO stage."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rlhf import state
from rlhf.distributed import World
from tests.distributed.steps import weights
from tests.distributed.test_engine import causal_engine, train
from tests.helpers import run_ranks, save_state, saved_state

Shape = tuple[int, int, str]  # ZeRO stage, ranks, dtype


def write(world: World, models: Path, stage: int, dtype: str, lora: bool, folder: Path) -> dict[str, Tensor]:
    engine = causal_engine(world, models / "llama", stage, dtype, lora, sgd=False, learning_rate=0.01)
    train(engine, world, 2)
    save_state(engine, folder)
    before = weights(engine)
    train(engine, world, 1)
    return before | {f"next {name}": t for name, t in weights(engine).items()}


def read(world: World, models: Path, stage: int, dtype: str, lora: bool, folder: Path, again: Path) -> dict[str, Tensor]:
    engine = causal_engine(world, models / "llama", stage, dtype, lora, sgd=False, learning_rate=0.01)
    engine.load(folder)
    assert engine.optimizer_steps == 2
    before = weights(engine)
    save_state(engine, again)
    train(engine, world, 1)
    return before | {f"next {name}": t for name, t in weights(engine).items()}


WAYS: list[tuple[Shape, Shape]] = [
    ((3, 2, "bfloat16"), (3, 2, "bfloat16")),
    ((3, 2, "float32"), (2, 1, "float32")),
    ((2, 2, "float32"), (3, 3, "float32")),  # six rows: as many on each rank
    ((1, 2, "bfloat16"), (3, 1, "bfloat16")),
    ((0, 2, "float32"), (3, 2, "float32")),
]
STAGES: list[tuple[int, str]] = [(s, d) for s in (0, 1, 2, 3) for d in ("float32", "bfloat16") if (s, d) != (0, "bfloat16")]
ALL = [((a, r, d), (b, q, e)) for a, d in STAGES for b, e in STAGES if d == e for r, q in ((2, 1), (1, 3), (2, 2))]


@pytest.mark.parametrize(
    ("wrote", "reads", "lora"),
    [
        pytest.param(*way, lora, marks=[] if way in WAYS and lora == (way == WAYS[1]) else pytest.mark.slow)
        for way in dict.fromkeys([*WAYS, *ALL])
        for lora in (False, True)
    ],
)
def test_goes_on_in_another_shape(models: Path, tmp_path: Path, wrote: Shape, reads: Shape, lora: bool) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    expected = run_ranks(write, wrote[1], models, wrote[0], wrote[2], lora, first)[0]
    found = run_ranks(read, reads[1], models, reads[0], reads[2], lora, first, second)[0]
    (tensors, scalars), (tensors_again, scalars_again) = saved_state(first), saved_state(second)
    assert {key.split("/")[0] for key in tensors} == {"weight", "exp_avg", "exp_avg_sq"} and len(tensors) > 9
    assert not any(t.isnan().any() for t in tensors.values())
    assert {s["step"] for s in scalars.values()} == {2.0} and scalars == scalars_again
    assert tensors.keys() == tensors_again.keys() and [k for k, t in tensors.items() if not torch.equal(t, tensors_again[k])] == []
    for name, tensor in expected.items():
        if wrote == reads or not name.startswith("next"):
            assert torch.equal(found[name], tensor), name
        else:  # gradients of other ranks are added up in another order
            torch.testing.assert_close(found[name], tensor, atol=2e-5 if wrote[2] == "float32" else 0.03, rtol=1e-3)


def sizes(world: World, models: Path, stage: int, dtype: str) -> list[tuple[int, int]]:
    engine = causal_engine(world, models / "llama", stage, dtype, False, sgd=False, learning_rate=0.01)
    found = [(engine.state_bytes(), engine.states_to_come())]
    train(engine, world, 1)
    return [*found, (engine.state_bytes(), engine.states_to_come())]


def waits(world: World, models: Path, stage: int) -> list[str]:
    """What happens in two optimizer steps, of which a background save holds the first; then in a held `load`."""
    engine = causal_engine(world, models / "llama", stage, "float32", False, sgd=False, learning_rate=0.01)
    seen: list[str] = []
    torch.cuda.current_stream = lambda *device: SimpleNamespace(wait_event=seen.append)  # type: ignore[assignment]
    whole, read = engine._engine.step, state.read
    engine._engine.step = lambda *given: (seen.append("step"), whole(*given))
    state.read = lambda *given: (seen.append("read"), read(*given))[1]
    folder = Path(world.broadcast_object(tempfile.mkdtemp()))
    save_state(engine, folder)
    engine.hold("copied")  # type: ignore[arg-type]
    train(engine, world, 2)
    engine.hold("copied")  # type: ignore[arg-type]
    engine.load(folder)
    return seen


def test_a_held_state_does_not_change_before_it_is_copied(models: Path) -> None:
    """The order of calls. What the streams of a GPU make of it is tested there by the bytes, which so far were right without the wait too."""
    assert run_ranks(waits, 1, models, 3)[0] == ["copied", "step", "step", "copied", "read"]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_size_is_known_before_the_first_step(models: Path, stage: int) -> None:
    """From which optimizers have their moments; memory and time for a first save are set aside before, and a rollout leaves them their memory."""
    (((before, to_come), (after, nothing)),) = run_ranks(sizes, 1, models, stage, "float32")
    assert before == after and not to_come and not nothing
