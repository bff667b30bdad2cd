"""States in host memory between steps, frozen weights between phases: the same bits, and really gone. On CPU "host" is memory of its own."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf import offload
from rlhf.distributed import World
from rlhf.engine import FrozenEngine, TrainEngine, loading_context
from rlhf.models.loading import load_causal_lm
from rlhf.offload import OffloadedStates, Parked
from rlhf.trainers.rl import train_rl
from tests.distributed.steps import weights
from tests.distributed.test_engine import causal_engine, forward, settings, train
from tests.helpers import rl_config, run_ranks, write_jsonl


def states_of(engine: TrainEngine) -> list[Tensor]:
    """Master weights and moments, flat."""
    zero = engine._engine.optimizer
    masters = next(getattr(zero, n) for n in dir(zero) if n.endswith(("partitioned_groups_flat", "of_fp32_groups", "groups_flat_partition")) and "fp32" in n)
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
            engine.save(saved)
            gone += [absent(engine)] if offloads else []
    return {**weights(engine), **{f"state {i}": t for i, t in enumerate(states_of(engine))}}, norms, all(gone)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a), [n for n in a if not torch.equal(a[n], b[n])]


CASES = [(3, "bfloat16", 2), (3, "float32", 1), (2, "bfloat16", 1), (2, "float32", 2), (1, "bfloat16", 2), (1, "float32", 1)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"zero{c[0]}-{c[1]}-{c[2]}")
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
