"""The gradient does not depend on how the data is split (traps 5, 6, 23, 25): PPO (policy and critic) and GRPO in float32.

Measured on weight changes under SGD with learning rate 1, against a plain PyTorch program that walks row by row, without padding,
and against one rank with everything in one forward.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import rlhf.models.compiling as compiling_module
import rlhf.models.fused as fused_module
import rlhf.ops.head as head_module
import rlhf.trainers.rl as rl_module
import rlhf.trainers.run as run_module
from rlhf.config import Recomputed
from rlhf.distributed import World
from rlhf.trainers.rl import describe_experience
from rlhf.types import Rollout, Scores
from tests.distributed.steps import experience_of, open_models, update, weights
from tests.helpers import VOCABULARY, make_rollout, make_scores, relative, rl_config, run_ranks

TEMPERATURE = 0.7
FORWARDS: dict[str, dict[str, Any]] = {
    "padded": {"packing": False},
    "packed": {"packing": True},
    "tokens": {"packing": True, "micro_batch_tokens": 40},
}
HEADS = ("logits", "one chunk", "chunks")  # how the head scores: from its logits, or without them, all tokens at once or five at a time
ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": {"name": "ppo", "truncation": "bootstrap", "entropy_coef": 0.01, "kl": {"coef": 0.3}},
    "grpo": {"name": "grpo", "loss_mean": "sequences", "kl": {"coef": 0.1, "place": "loss", "estimator": "k2"}},
    "dr_grpo": {"name": "grpo", "group_scale": "none", "loss_mean": "constant", "truncation": "mask", "entropy_coef": 0.01},
}


def data() -> tuple[Rollout, Scores]:
    """15 rows (5 groups of 3): an odd number, unequal lengths, one row without a score, one cut by the window."""
    prompt_lengths = [4, 4, 4, 9, 9, 9, 2, 2, 2, 6, 6, 6, 3, 3, 3]
    response_lengths = [3, 8, 1, 5, 7, 2, 4, 12, 6, 9, 1, 10, 5, 5, 11]
    rollout = make_rollout(prompt_lengths, response_lengths, window=12, group_size=3, cut=(7,))
    generator = torch.Generator().manual_seed(11)
    return rollout, make_scores(torch.randn(15, generator=generator).tolist(), invalid=(4,))


def step_on_ranks(
    world: World,
    models: Path,
    algorithm: str,
    stage: int,
    micro_batch: int,
    minibatches: int,
    forwards: str = "padded",
    head: str = "one chunk",
    checkpointing: Recomputed = False,
    backend: str | None = None,
) -> dict[str, dict[str, Tensor]]:
    """backend: of compiled layers; None = not compiled."""
    counters.clear()  # of the process that this one was forked from
    if head == "logits":
        run_module.fuse_head = rl_module.fuse_head = lambda model: False  # type: ignore[assignment]
    elif head == "chunks":
        head_module.CHUNK_BYTES = 5 * VOCABULARY * 4
    # Several steps at rate 1 would blow rounding up: each starts where the one before has landed.
    compiled = {"compile": backend is not None}
    compiling_module.BACKEND = backend or compiling_module.BACKEND
    rate = {"learning_rate": 1.0 if minibatches == 1 else 0.1, "gradient_checkpointing": checkpointing, **compiled}
    config = rl_config(
        models,
        stage,
        actor=rate,
        critic={**rate, "init": "path", "path": models / "scalar", "head": "keep"},
        reference={"path": models / "reference", **compiled},
        algorithm={**ALGORITHMS[algorithm], "minibatches": minibatches},
        rollout={"prompts": 5, "group_size": 3, "max_new_tokens": 12, "temperature": TEMPERATURE},
        train={"micro_batch": micro_batch, **FORWARDS[forwards]},
    )
    held, run = open_models(config, world)
    before = {name: weights(engine) for name, engine in held.engines.items()}
    update(held, run, experience_of(held, run, *data()))
    assert (counters["stats"]["unique_graphs"] > 0) == (backend is not None)
    after = {name: weights(engine) for name, engine in held.engines.items()}
    return {name: {n: after[name][n] - before[name][n] for n in before[name]} for name in before}


_whole: dict[tuple[str, int], dict[str, dict[str, Tensor]]] = {}


def whole(models: Path, algorithm: str, minibatches: int) -> dict[str, dict[str, Tensor]]:
    """One rank, stage 0, a minibatch in a single forward."""
    key = (algorithm, minibatches)
    if key not in _whole:
        _whole[key] = run_ranks(step_on_ranks, 1, models, algorithm, 0, 15, minibatches)[0]
    return _whole[key]


def assert_same(
    models: Path,
    algorithm: str,
    ranks: int,
    stage: int,
    micro_batch: int,
    minibatches: int,
    forwards: str,
    head: str,
    checkpointing: Recomputed,
    backend: str | None = None,
) -> None:
    expected = whole(models, algorithm, minibatches)
    case = (models, algorithm, stage, micro_batch, minibatches, forwards, head, checkpointing, backend)
    for result in run_ranks(step_on_ranks, ranks, *case, timeout=90 if backend is None else 110):
        for name, delta in expected.items():
            assert relative(result[name], delta) < 1e-5, name


# algorithm, ranks, ZeRO stage, rows per forward, minibatches, what a forward is, head, checkpointing: every pair of values meets.
PAIRWISE = [
    ("grpo", 1, 2, 1, 3, "tokens", "chunks", "mlp"),
    ("dr_grpo", 2, 3, 8, 1, "packed", "logits", False),
    ("ppo", 2, 0, 3, 3, "padded", "one chunk", True),
    ("ppo", 1, 1, 3, 1, "tokens", "chunks", False),
    ("grpo", 2, 1, 1, 1, "padded", "logits", True),
    ("dr_grpo", 1, 1, 8, 3, "packed", "one chunk", "mlp"),
    ("dr_grpo", 2, 0, 8, 1, "tokens", "chunks", True),
    ("ppo", 1, 3, 3, 3, "padded", "logits", "mlp"),
    ("ppo", 2, 2, 1, 1, "packed", "one chunk", False),
    ("grpo", 1, 0, 3, 3, "packed", "logits", False),
    ("dr_grpo", 1, 2, 3, 3, "padded", "chunks", True),
    ("grpo", 2, 3, 8, 1, "tokens", "one chunk", "mlp"),
    ("dr_grpo", 2, 3, 1, 3, "packed", "chunks", True),
    ("ppo", 1, 2, 8, 3, "padded", "logits", False),
    ("grpo", 2, 0, 1, 1, "tokens", "logits", "mlp"),
]


def met(cases: Sequence[tuple[Any, ...]]) -> set[tuple[Any, ...]]:
    return {(i, str(a), j, str(b)) for case in cases for (i, a), (j, b) in itertools.combinations(enumerate(case), 2)}


def test_every_pair_of_values_meets() -> None:
    values = [ALGORITHMS, (1, 2), range(4), (1, 3, 8), (1, 3), FORWARDS, HEADS, (False, True, "mlp")]
    assert met(PAIRWISE) == met(list(itertools.product(*values)))
    quick = [case for case in COMPILED if type(case) is tuple]
    assert all({case[i] for case in quick} == set(values[i]) for i in (0, 1, 5, 6, 7))


@pytest.mark.parametrize(("algorithm", "ranks", "stage", "micro_batch", "minibatches", "forwards", "head", "checkpointing"), PAIRWISE)
def test_gradient_is_the_same_pairwise(
    models: Path, algorithm: str, ranks: int, stage: int, micro_batch: int, minibatches: int, forwards: str, head: str, checkpointing: Recomputed
) -> None:  # fmt: skip
    """trap 5, trap 6, trap 25"""
    assert_same(models, algorithm, ranks, stage, micro_batch, minibatches, forwards, head, checkpointing)


# As above, with compiled layers in all models: the quick ones meet every kind of forward, head and checkpointing (those above are not compiled).
COMPILED = [
    ("dr_grpo", 2, 3, 8, 1, "packed", "chunks", "mlp"),
    ("ppo", 1, 0, 15, 1, "padded", "logits", False),
    ("grpo", 1, 0, 15, 1, "tokens", "one chunk", True),
    pytest.param("ppo", 2, 3, 3, 1, "packed", "chunks", False, marks=pytest.mark.slow),
    pytest.param("ppo", 2, 2, 8, 3, "tokens", "logits", "mlp", marks=pytest.mark.slow),
    pytest.param("grpo", 2, 3, 3, 3, "tokens", "one chunk", True, marks=pytest.mark.slow),
    pytest.param("dr_grpo", 2, 3, 8, 1, "padded", "chunks", "mlp", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("algorithm", "ranks", "stage", "micro_batch", "minibatches", "forwards", "head", "checkpointing"), COMPILED)
def test_gradient_is_the_same_from_compiled_layers(
    models: Path, algorithm: str, ranks: int, stage: int, micro_batch: int, minibatches: int, forwards: str, head: str, checkpointing: Recomputed
) -> None:  # fmt: skip
    """trap 5, trap 6, trap 25"""
    backend = "aot_eager" if ranks == 2 else "eager"  # which compiles no backward pass, and in half of the time; the grid below has all
    assert_same(models, algorithm, ranks, stage, micro_batch, minibatches, forwards, head, checkpointing, backend)


@pytest.mark.slow
@pytest.mark.parametrize(("forwards", "head", "checkpointing"), list(itertools.product(FORWARDS, ("logits", "chunks"), (False, True, "mlp"))))
@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2), (2, 3)])
def test_gradient_is_the_same_from_compiled_layers_however_a_forward_is_computed(
    models: Path, ranks: int, stage: int, forwards: str, head: str, checkpointing: Recomputed
) -> None:  # fmt: skip
    """trap 5, trap 6, trap 25"""
    assert_same(models, "ppo", ranks, stage, 3, 1, forwards, head, checkpointing, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("forwards", ["padded", "packed"])
def test_gradient_is_the_same_from_inductor(models: Path, forwards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """trap 5, trap 6, trap 25"""
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes in forked ranks
    assert_same(models, "dr_grpo", 2, 3, 3, 1, forwards, "chunks", False, "inductor")


@pytest.mark.slow
@pytest.mark.parametrize(("forwards", "head", "checkpointing"), list(itertools.product(FORWARDS, HEADS, (False, True, "mlp"))))
@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradient_is_the_same_however_a_forward_is_computed(
    models: Path, algorithm: str, ranks: int, stage: int, forwards: str, head: str, checkpointing: Recomputed
) -> None:  # fmt: skip
    """trap 5, trap 6, trap 25"""
    assert_same(models, algorithm, ranks, stage, 3, 1, forwards, head, checkpointing)


@pytest.mark.slow
@pytest.mark.parametrize("forwards", FORWARDS)
@pytest.mark.parametrize(("ranks", "stage", "micro_batch", "minibatches"), list(itertools.product((1, 2), (0, 1, 2, 3), (1, 3, 8), (1, 3))))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradient_is_the_same_full_grid(
    models: Path, algorithm: str, ranks: int, stage: int, micro_batch: int, minibatches: int, forwards: str
) -> None:  # fmt: skip
    """trap 5, trap 6, trap 25"""
    assert_same(models, algorithm, ranks, stage, micro_batch, minibatches, forwards, "one chunk", False)


# --------------------------------------------------------------------------------------------------------------------------
# The same step, row by row


def row_logits(model: Any, rollout: Rollout, row: int) -> Tensor:
    """[n, V] logits that score the n response tokens, at the sampling temperature."""
    p, n = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
    ids = rollout.input_ids[row, : p + n]
    return model(ids[None]).logits[0, p - 1 : -1] / TEMPERATURE


def row_logprobs(model: Any, rollout: Rollout, row: int) -> tuple[Tensor, Tensor]:
    distribution = row_logits(model, rollout, row).log_softmax(-1)
    ids = torch.tensor(rollout.response_ids(row))
    return distribution[torch.arange(len(ids)), ids], -(distribution.exp() * distribution).sum(-1)


def row_values(model: Any, rollout: Rollout, row: int) -> Tensor:
    """[n + 1] values before each response token and after the last."""
    p, n = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
    hidden = model.model(rollout.input_ids[None, row, : p + n]).last_hidden_state
    return model.score(hidden)[0, p - 1 :, 0]


def plain_ppo(models: Path) -> dict[str, dict[str, Tensor]]:
    """Weight changes of one SGD step at learning rate 1, worked out without rlhf."""
    rollout, scores = data()
    actor, reference = (AutoModelForCausalLM.from_pretrained(models / name, attn_implementation="eager") for name in ("llama", "reference"))
    critic = AutoModelForSequenceClassification.from_pretrained(models / "scalar", attn_implementation="eager")
    rows = [row for row in range(15) if scores.valid[row]]
    tokens = sum(int(rollout.response_lengths[row]) for row in rows)
    advantages, returns = {}, {}
    for row in rows:
        with torch.no_grad():
            values = row_values(critic, rollout, row).tolist()
            kl = (row_logprobs(actor, rollout, row)[0] - row_logprobs(reference, rollout, row)[0]).tolist()
        ended = bool(rollout.finished[row])
        values[-1] = 0.0 if ended else values[-1]
        rewards = [-0.3 * k for k in kl]
        rewards[-1] += float(scores.total[row]) if ended else 0.0
        running, found = 0.0, []
        for t in reversed(range(len(rewards))):
            running = rewards[t] + values[t + 1] - values[t] + 0.95 * running
            found.append(running)
        advantages[row] = torch.tensor(found[::-1])
        returns[row] = advantages[row] + torch.tensor(values[:-1])
    every = torch.cat(list(advantages.values())).double()
    mean, deviation = every.mean(), every.var(correction=0).sqrt()
    for row in rows:
        logprobs, entropy = row_logprobs(actor, rollout, row)
        # On policy the clipped surrogate's gradient is that of advantage * logprob.
        loss = (-((advantages[row] - mean) / deviation).float() * logprobs - 0.01 * entropy).sum()
        (loss / tokens).backward()
        (0.5 * ((row_values(critic, rollout, row)[:-1] - returns[row]) ** 2).sum() / tokens).backward()
    return {"actor": changes(actor), "critic": changes(critic)}


def plain_grpo(models: Path) -> dict[str, dict[str, Tensor]]:
    rollout, scores = data()
    actor, reference = (AutoModelForCausalLM.from_pretrained(models / name, attn_implementation="eager") for name in ("llama", "reference"))
    rows = [row for row in range(15) if scores.valid[row]]
    for row in rows:
        group = [scores.total[other].item() for other in rows if other // 3 == row // 3]
        mean = sum(group) / len(group)
        deviation = (sum((x - mean) ** 2 for x in group) / (len(group) - 1)) ** 0.5
        logprobs, _ = row_logprobs(actor, rollout, row)
        with torch.no_grad():
            against = row_logprobs(reference, rollout, row)[0]
        loss = -(scores.total[row].item() - mean) / deviation * logprobs + 0.1 * 0.5 * (logprobs - against) ** 2
        (loss.mean() / len(rows)).backward()
    return {"actor": changes(actor)}


def changes(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else -p.grad for name, p in model.named_parameters()}


@lru_cache
def plain(models: Path, algorithm: str) -> dict[str, dict[str, Tensor]]:
    return {"ppo": plain_ppo, "grpo": plain_grpo}[algorithm](models)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_gradient_is_that_of_a_plain_program(models: Path, algorithm: str) -> None:
    """trap 1, trap 4, trap 5, trap 6, trap 13, trap 16: every off-by-one, wrong mean or wrong temperature would show here."""
    expected, found = plain(models, algorithm), whole(models, algorithm, 1)
    assert expected.keys() == found.keys()
    for name in expected:
        assert relative(found[name], expected[name]) < 1e-5, name


# --------------------------------------------------------------------------------------------------------------------------
# A step with a single update needs no pass for old logprobs


def with_and_without_pass(world: World, models: Path, algorithm: str) -> list[dict[str, Tensor]]:
    results = []
    for old_logprobs in (True, None):
        config = rl_config(
            models,
            3,
            actor={"learning_rate": 1.0},
            reference={"path": models / "reference"},
            algorithm=ALGORITHMS[algorithm],
            rollout={"prompts": 5, "group_size": 3, "max_new_tokens": 12, "temperature": TEMPERATURE},
            train={"micro_batch": 4},
        )
        held, run = open_models(config, world)
        experience = experience_of(held, run, *data(), old_logprobs=old_logprobs)
        assert (experience.old_logprobs is None) == (old_logprobs is None)
        update(held, run, experience)
        assert experience.old_logprobs is not None
        known = torch.where(experience.rollout.response_mask, experience.old_logprobs, 0.0)
        results.append(weights(held.actor) | {"old": known, "kl": torch.tensor(describe_experience(experience, 0.1).get("actor/kl", 0.0))})
    return results


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo"])
def test_trap_2_a_single_update_needs_no_pass_for_old_logprobs(models: Path, algorithm: str) -> None:
    """trap 2: weights, logprobs and KL are the same bit for bit, on two ranks with a filler and a row that trains nothing."""
    for with_pass, without in run_ranks(with_and_without_pass, 2, models, algorithm):
        for name, tensor in with_pass.items():
            assert torch.equal(tensor, without[name]), name


# --------------------------------------------------------------------------------------------------------------------------
# Products that take their weight without calling its module


class _GatedDown(torch.autograd.Function):
    """`rlhf.ops.fused.gated_down` without its kernels: keeps its inputs, the weight among them, and makes the rest again."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        _GatedDown.calls += 1
        ctx.save_for_backward(gate, up, weight)
        return torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, weight)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
        gate, up, weight = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in (gate, up)]
            inner = torch.nn.functional.silu(inputs[0]) * inputs[1]
        d_gate, d_up = torch.autograd.grad(inner, inputs, d_out @ weight)
        return d_gate, d_up, d_out.flatten(0, -2).t() @ inner.detach().flatten(0, -2)


def step_with_gated_down(world: World, models: Path, checkpointing: Recomputed) -> tuple[dict[str, dict[str, Tensor]], int]:
    fused_module.gated_down = _GatedDown.apply  # type: ignore[assignment]
    return step_on_ranks(world, models, "ppo", 3, 3, 1, "packed", checkpointing=checkpointing), _GatedDown.calls


@pytest.mark.parametrize("checkpointing", [False, True, "mlp"])
def test_weights_of_a_layer_are_there_for_all_its_products_under_zero_3(models: Path, checkpointing: Recomputed) -> None:
    expected = whole(models, "ppo", 1)
    for found, calls in run_ranks(step_with_gated_down, 2, models, checkpointing):
        assert calls >= 2
        for name, delta in expected.items():
            assert relative(found[name], delta) < 1e-5, name
