"""`auto` through the whole program on CPU: resolved before the models load, the same after a resume, and a recipe's number wins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Finished, Ground
from tests.e2e.programs import checkpoints, steps, succeed
from tests.e2e.test_resume import assert_same_end, stopped_after

pytestmark = pytest.mark.timeout(300)

ROLE = {"learning_rate": 1e-3, "gradient_checkpointing": "auto", "offload": "auto"}


def recipe_of(ground: Ground, task: str) -> dict[str, Any]:
    folder = ground.folder
    data = {"train": {"path": folder / ("pairs.jsonl" if task == "reward_model" else "rows.jsonl")}}
    tree: dict[str, Any] = {"task": task, "data": data, "checkpoint": {"every": 1, "keep_last": 9, "save_hf": False}}
    tree["reward_model" if task == "reward_model" else "actor"] = {"path": folder / "base", **ROLE}
    if task != "rl":
        return tree | {"train": {"steps": 1, "batch": 16, "micro_batch_tokens": "auto"}}
    return tree | {
        "critic": ROLE,
        "reward": {"components": [{"function": "e2e_rewards:letter_a"}]},
        "rollout": {"prompts": 8, "group_size": 2, "max_new_tokens": 6, "max_batch": "auto"},
        "train": {"steps": 3, "micro_batch_tokens": "auto"},
    }


def chosen(run_dir: Path) -> Any:
    return json.loads((run_dir / "budget.json").read_text())["chosen"]


@pytest.mark.parametrize("task", ["sft", "reward_model"])
def test_tasks_of_one_model(task: str, ground: Ground) -> None:
    role = "reward_model" if task == "reward_model" else "actor"
    out = succeed(ground.recipe(f"auto-{task}", recipe_of(ground, task)), launcher="python", env=ground.env).out
    assert f"auto: train.micro_batch_tokens=16384 {role}.gradient_checkpointing=false {role}.offload=false: no GPU to measure by" in out
    narrow = {f"{role}.gradient_checkpointing": False, f"{role}.offload": False}
    assert chosen(ground.run_dir(f"auto-{task}")) == {"train.micro_batch_tokens": 16_384, **narrow}


@pytest.mark.slow
def test_a_rollout_with_everything_left_open(ground: Ground) -> None:
    recipe, run_dir = ground.recipe("auto-open", recipe_of(ground, "rl")), ground.run_dir("auto-open")
    out = succeed(recipe, "train.steps=1", launcher="python", env=ground.env).out
    assert "auto: train.micro_batch_tokens=16384 rollout.max_batch=128 actor.gradient_checkpointing=false" in out and steps(run_dir) == [1]
    assert chosen(run_dir)["rollout.max_batch"] == 128


@pytest.mark.slow
def test_a_run_goes_on_with_what_was_chosen(ground: Ground) -> None:
    recipe, run_dir = ground.recipe("auto-rl", recipe_of(ground, "rl")), ground.run_dir("auto-rl")
    dry = succeed(recipe, "--dry_run", launcher="python", env=ground.env).out
    line = "auto: train.micro_batch_tokens=16384 rollout.max_batch=128 actor.gradient_checkpointing=false critic.gradient_checkpointing=false "
    line += "actor.offload=false critic.offload=false: no GPU to measure by"
    assert line in dry and "micro_batch_tokens: 16384" in dry and not run_dir.exists()

    # What another machine chose: a start that goes on keeps to it, whatever it would choose itself.
    narrow = {"train.micro_batch_tokens": 64, "rollout.max_batch": 5, "actor.gradient_checkpointing": "mlp", "critic.gradient_checkpointing": True}
    narrow |= {"actor.offload": True, "critic.offload": False}
    given = [f"{key}={str(value).lower()}" for key, value in narrow.items()]
    straight = Finished(run_dir, recipe, succeed(recipe, *given, launcher="python", env=ground.env))
    assert not (run_dir / "budget.json").exists()
    resumed = stopped_after(straight, ground, 1)
    (resumed / "budget.json").write_text(json.dumps({"chosen": narrow}))
    out = succeed(recipe, f"run_dir={resumed}", launcher="python", env=ground.env).out
    assert f"auto: {' '.join(given)}: from budget.json" in out
    assert_same_end(run_dir, resumed, after=1, recipe=False)

    # From that checkpoint into another folder, which remembers it too.
    other = ground.run_dir("auto-rl-other")
    out = succeed(recipe, f"run_dir={other}", "--resume", str(resumed / "checkpoints" / "checkpoint-2"), launcher="python", env=ground.env).out
    assert "from budget.json" in out and chosen(other) == narrow and checkpoints(other) == [3]

    # A fresh start chooses afresh.
    shutil.rmtree(other)
    other.mkdir()
    (other / "budget.json").write_text(json.dumps({"train.micro_batch_tokens": 128, "chosen": narrow}))
    assert line in succeed(recipe, f"run_dir={other}", "train.steps=1", launcher="python", env=ground.env).out
    assert chosen(other)["train.micro_batch_tokens"] == 16_384
