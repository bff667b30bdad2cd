"""Numbers that cannot be right on one rank: the same decision on all, and no weight is ever spoilt."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import rlhf.trainers.rl
from rlhf.config import load_config
from rlhf.data import DrawSampler
from rlhf.distributed import World
from rlhf.guards import ANY_SIZE, FLOORS, LEARNING, Action, Guard
from tests.chaos.test_boundaries import GRPO, PPO
from tests.e2e.conftest import REWARDS
from tests.e2e.programs import make_model, metrics, reversal_rows, write_jsonl, write_recipe
from tests.helpers import run_ranks

pytestmark = pytest.mark.timeout(600)

# --------------------------------------------------------------------------------------------------------------------------
# The decision


def test_skips_then_rolls_back_then_stops() -> None:
    guard = Guard(2)
    actions = [guard.judge("bad", {})[0] for _ in range(6)]
    assert actions == [Action.SKIP, Action.SKIP, Action.ROLL_BACK, Action.SKIP, Action.SKIP, Action.STOP]
    guard = Guard(2)
    actions = [guard.judge(problem, {})[0] for problem in ["bad"] * 3 + [None] * 2 + ["bad"] * 3]
    assert actions == [Action.SKIP, Action.SKIP, Action.ROLL_BACK, Action.GO_ON, Action.GO_ON, Action.SKIP, Action.SKIP, Action.ROLL_BACK]


def test_explosions_are_measured_by_the_run_itself() -> None:
    guard = Guard(3)
    for step in range(LEARNING):
        assert guard.judge(None, {"actor/grad_norm": 0.5 + 0.01 * step, "actor/kl": 1e-6})[0] is Action.GO_ON
    assert guard.judge(None, {"actor/grad_norm": 9.0, "actor/kl": 0.9})[0] is Action.GO_ON, "a KL that has only begun is no explosion"
    assert guard.judge(None, {"actor/grad_norm": 0.4, "actor/kl": math.nan})[1] == "actor/kl is nan"
    action, why, _ = guard.judge(None, {"actor/grad_norm": 1000.0})
    assert action is Action.SKIP and why == "actor/grad_norm is 1e+03, and has never been above 9"
    assert guard.judge(None, {"actor/grad_norm": 0.5})[0] is Action.GO_ON, "what exploded is no part of what is usual"


@pytest.mark.parametrize("name", FLOORS)
def test_whatever_explodes_or_is_no_number_is_bad(name: str) -> None:
    guard = Guard(3)
    if name not in ANY_SIZE:
        assert guard.judge(None, {name: 1e20})[1] == f"{name} is 1e+20 in one of the first steps"
        assert guard.judge(None, {name: math.inf})[1] == f"{name} is inf"
    for step in range(LEARNING):
        assert guard.judge(None, {name: 0.1 * step})[0] is Action.GO_ON
    assert guard.judge(None, {name: 1e30})[1] == f"{name} is 1e+30, and has never been above 0.7"
    assert guard.judge(None, {name: -1e30})[0] is Action.SKIP


def test_a_step_that_takes_unusually_long_is_said() -> None:
    guard = Guard(1)
    for step in range(LEARNING):
        others = {"timing_s/testing": 8.0, "timing_s/save_checkpoint": 1.0} if step % 4 == 3 else {}
        assert guard.timed({"timing_s/step": 2.0 + 0.01 * step + sum(others.values()), **others}) == [], "some steps also validate and save"
    assert guard.timed({"timing_s/step": 7.0}) == ["unusual: timing_s/step without testing and save_checkpoint is 7, its median so far 2.035"]
    assert guard.timed({}) == []


def test_goes_on_with_what_it_has_learnt() -> None:
    guard, again = Guard(1), Guard(1)
    for step in range(LEARNING):
        guard.judge(None, {"actor/entropy": 1.0 + 0.01 * step})
    guard.judge("bad", {})
    again.load_state_dict(guard.state_dict())
    for g in (guard, again):
        assert g.judge(None, {"actor/entropy": 0.1})[2] == ["unusual: actor/entropy is 0.1, its median so far 1.035"]
        assert g.judge("bad", {})[0] is Action.SKIP
        assert g.judge("bad", {})[0] is Action.ROLL_BACK


# --------------------------------------------------------------------------------------------------------------------------
# Whole runs, two ranks; rank 1 alone is hit


SPOILT = """

import math
import os


def spoilt_letters(completions, **columns):
    if os.path.exists(os.environ.get("SPOILT", "")):  # of the rank that this process scores for
        return [math.nan] * len(completions)
    return [sum(c < "n" for c in text) / 6 for text in completions]
"""


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guards")
    make_model(folder / "base")
    write_jsonl(folder / "rows.jsonl", reversal_rows(200))
    (folder / "python").mkdir()
    (folder / "python" / "e2e_rewards.py").write_text(REWARDS + SPOILT)
    return folder


def recipe_of(ground: Path, algorithm: dict[str, Any], stage: int, steps: int) -> Path:
    recipe = {
        "task": "rl",
        "run_dir": ground / "unset",
        "threads": 1,
        "deepspeed": {"zero_optimization": {"stage": stage}},
        "actor": {"path": ground / "base", "learning_rate": 2e-3},
        "data": {"train": {"path": ground / "rows.jsonl"}},
        "reward": {"components": [{"function": "e2e_rewards:spoilt_letters"}]},
        "rollout": {"prompts": 8, "group_size": 2, "max_new_tokens": 6},
        "algorithm": algorithm,
        "train": {"steps": steps, "bad_steps": 1, "micro_batch": 4},
        "checkpoint": {"save_hf": False, "every": 1, "keep_last": 100},
        **({"critic": {"learning_rate": 2e-3}} if algorithm["name"] == "ppo" else {}),
    }
    return write_recipe(ground / f"{algorithm['name']}-{stage}-{steps}.yaml", recipe)


def spoil(where: str, world: World, bad: Callable[[int], bool], run_dir: Path) -> None:
    """NaN at this place, on rank 1, in the steps that are to be bad."""
    real_learn, step_now = rlhf.trainers.rl.learn, {"step": 0}

    def learn(models: Any, config: Any, timer: Any, rollout: Any, scored: Any, step: int, *rest: Any) -> Any:
        step_now["step"] = step
        return real_learn(models, config, timer, rollout, scored, step, *rest)

    rlhf.trainers.rl.learn = learn

    def now() -> bool:
        return world.rank == 1 and bad(step_now["step"])

    if where in ("logprob", "value"):
        name = "response_logprobs" if where == "logprob" else "response_values"
        real = getattr(rlhf.trainers.rl, name)

        def spoilt(*arguments: Any, **keywords: Any) -> Any:
            found = real(*arguments, **keywords)
            tensor = found[0] if isinstance(found, tuple) else found
            if now() and not tensor.requires_grad:
                tensor[:, 0] = math.nan
            return found

        setattr(rlhf.trainers.rl, name, spoilt)
    elif where == "loss":
        real_loss = rlhf.trainers.rl.policy_loss

        def policy_loss(*arguments: Any) -> Any:
            found = real_loss(*arguments)
            if now():
                found.loss_sum = found.loss_sum * math.nan
            return found

        rlhf.trainers.rl.policy_loss = policy_loss
    elif where == "gradient":
        real_loss = rlhf.trainers.rl.policy_loss

        def policy_loss(forward: Any, *arguments: Any) -> Any:
            found = real_loss(forward, *arguments)
            if now():
                found.loss_sum.register_hook(lambda gradient: gradient * math.inf)
            return found

        rlhf.trainers.rl.policy_loss = policy_loss
    else:
        real_next, marker, taken = DrawSampler.next, run_dir.with_name(f"{run_dir.name}.spoilt"), {"steps": 0}
        if world.rank == 1:
            os.environ["SPOILT"] = str(marker)  # its scorers inherit it

        def next_draws(sampler: DrawSampler, count: int) -> Any:
            taken["steps"] += 1
            if world.rank == 1:
                marker.touch() if bad(taken["steps"]) else marker.unlink(missing_ok=True)
            return real_next(sampler, count)

        DrawSampler.next = next_draws  # type: ignore[method-assign]


def train(world: World, ground: Path, recipe: Path, run_dir: Path, where: str, first: int, last: int) -> str:
    """What it ended with."""
    import sys

    sys.path.insert(0, str(ground / "python"))
    spoil(where, world, lambda step: first <= step <= last, run_dir)
    try:
        with ExitStack() as cleanup:
            rlhf.trainers.rl.train_rl(load_config(recipe, [f"run_dir={run_dir}"]), world, "never", cleanup)
    except SystemExit as leaving:
        return str(leaving.code)
    return "done"


def assert_finite(run_dir: Path, steps: list[int]) -> None:
    for step in steps:
        for file in (run_dir / "checkpoints" / f"checkpoint-{step}").glob("*/rank-*-*.safetensors"):
            assert all(tensor.isfinite().all() for tensor in load_file(file).values()), file


QUICK = [("logprob", "grpo", 2), ("loss", "ppo", 3), ("gradient", "grpo", 0)]
ALL = [
    (where, name, 3) for name in ("ppo", "grpo") for where in ("reward", "logprob", "value", "loss", "gradient") if (where, name) != ("value", "grpo")
]


@pytest.mark.parametrize(("where", "name", "stage"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in QUICK)])
def test_nan_on_one_rank_costs_a_step(where: str, name: str, stage: int, ground: Path) -> None:
    recipe, run_dir = recipe_of(ground, PPO if name == "ppo" else GRPO, stage, 3), ground / f"{where}-{name}-{stage}"
    assert run_ranks(train, 2, ground, recipe, run_dir, where, 2, 2) == ["done", "done"]
    lines = metrics(run_dir)
    # A reward that is no number costs its samples only, which were half of the batch.
    assert [line["guard/bad_steps"] for line in lines] == ([0, 0, 0] if where == "reward" else [0, 1, 0])
    assert where != "reward" or lines[1]["reward/invalid"] > 0
    assert_finite(run_dir, [1, 3])
    assert (run_dir / "checkpoints" / "checkpoint-2").exists() == (where == "reward"), "a bad step is no good place to go back to"


def test_what_stays_bad_goes_back_once_and_stops_with_its_batch(ground: Path) -> None:
    recipe, run_dir = recipe_of(ground, GRPO, 3, 9), ground / "stays bad"
    assert run_ranks(train, 2, ground, recipe, run_dir, "loss", 3, 9) == ["77", "77"]
    lines = metrics(run_dir)
    assert [line["guard/rolled_back"] for line in lines] == [0, 0, 0, 1, 0]
    batch = load_file(run_dir / "bad-step-000006" / "experience.safetensors")
    assert batch["input_ids"].shape[0] == 16 and {"rewards", "advantages", "mask"} <= batch.keys()
    assert (run_dir / "bad-step-000006" / "why.txt").read_text() == "the actor's gradient is not finite\n"
    assert len((run_dir / "bad-step-000006" / "samples.jsonl").read_text().splitlines()) == 16
