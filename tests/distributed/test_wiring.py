"""What only saves time or memory is switched on in the models that the program builds: results would be the same without it, so that no other test
would miss it."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf.models.compiling as compiling_module
import rlhf.ops.head as head_module
from rlhf.distributed import World
from tests.distributed.steps import experience_of, open_models, update
from tests.helpers import VOCABULARY, make_rollout, make_scores, rl_config, run_ranks

ROLLOUT = make_rollout([4, 4, 9, 9], [8, 8, 5, 7], window=8)
SCORES = make_scores([0.3, -1.0, 0.5, 2.0])
CHUNK = 5  # rows of the head
LAYERS = 2


@dataclasses.dataclass
class Seen(TorchDispatchMode):
    """Most rows of a tensor over the vocabulary, and how often activations and attention were computed."""

    rows: int = 0
    activations: int = 0
    attention: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.activations += func is torch.ops.aten.silu.default
        self.attention += "scaled_dot_product" in str(func) and "backward" not in str(func)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            # Weights and their gradients have the vocabulary as rows; turned round they are still no logits.
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == VOCABULARY and func is not torch.ops.aten.t.default:
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return out


def built(world: World, models: Path, checkpointing: Any, compiled: str = "") -> tuple[Seen, Seen, int]:
    """What was seen in the passes before an update and in the update itself, and how many graphs were compiled; compiled: the role that is."""
    compiling_module.BACKEND = "eager"
    counters.clear()  # of the process that this one was forked from
    head_module.CHUNK_BYTES = CHUNK * VOCABULARY * 4
    roles: dict[str, Any] = {name: {"gradient_checkpointing": checkpointing, "compile": name == compiled} for name in ("actor", "critic")}
    roles["reference"] = {"compile": compiled == "reference"}
    algorithm = {"name": "ppo", "kl": {"coef": 0.1}}
    opened, run = open_models(rl_config(models, algorithm=algorithm, train={"micro_batch": 8}, **roles), world)
    before, during = Seen(), Seen()
    with contextlib.nullcontext() if compiled else before:  # where somebody watches, nothing is compiled
        experience = experience_of(opened, run, ROLLOUT, SCORES, old_logprobs=True)
    with contextlib.nullcontext() if compiled else during:
        update(opened, run, experience)
    return before, during, counters["stats"]["unique_graphs"]


def test_no_logits_as_a_whole_and_what_is_recomputed_is_recomputed(models: Path) -> None:
    found = {level: run_ranks(built, 1, models, level)[0] for level in (False, "mlp", True)}
    for before, during, graphs in found.values():
        assert 0 < before.rows <= CHUNK and 0 < during.rows <= CHUNK  # of 28 tokens; reference and old policy, then the update
        assert graphs == 0
    once = 2 * LAYERS  # actor and critic
    assert {level: during.activations for level, (_, during, _) in found.items()} == {False: once, "mlp": 2 * once, True: 2 * once}
    plain = found[False][1].attention
    assert plain >= once and found["mlp"][1].attention == plain and found[True][1].attention == 2 * plain


@pytest.mark.slow  # that something is compiled the quick cases of test_invariance assert
@pytest.mark.parametrize("role", ["actor", "critic", "reference"])
def test_layers_of_a_role_are_compiled(models: Path, role: str) -> None:
    *_, graphs = run_ranks(built, 1, models, False, role)[0]
    assert graphs > 0
