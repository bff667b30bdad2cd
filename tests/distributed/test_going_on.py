"""A run that is started again with other data, or with another recipe: what is refused, what is said, and what is left as it was."""

from __future__ import annotations

import contextlib
import io
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import parse_config
from rlhf.distributed import World
from rlhf.requests import STOP, Requests
from rlhf.trainers import reward_model, rl, sft
from tests.helpers import deepspeed_block, run_ranks, write_jsonl

TASKS = {"sft": sft.train_sft, "reward_model": reward_model.train_reward_model, "rl": rl.train_rl}
ROLES = {"sft": "actor", "reward_model": "reward_model", "rl": "actor"}


def rows(*words: int) -> list[dict[str, str]]:
    return [{"prompt": f"w{word} w9" + " w4" * (word > 19), "response": "w7", "answer": "w7", "chosen": "w7 w8", "rejected": "w8"} for word in words]


def started(world: World, models: Path, task: str, words: list[int], changes: dict[str, Any], asked: int) -> tuple[str, str]:
    """(what the console says, the refusal if it is one); asked: after so many boundaries it is asked to leave."""
    folder = models.parent / f"going-on-{task}"
    folder.mkdir(exist_ok=True)
    tree: dict[str, Any] = {
        "task": task,
        "run_dir": folder / changes.get("run", "run"),
        "threads": 1,
        "deepspeed": deepspeed_block(2, sgd=False),
        ROLES[task]: {"path": models / "llama", "dtype": "float32", **changes.get("role", {})},
        "reward": {"components": [{"function": "exact_match"}]} if task == "rl" else {},
        "algorithm": {"name": "grpo", **changes.get("algorithm", {})},
        "rollout": {"prompts": 2, "group_size": 2, "max_new_tokens": 3, **changes.get("rollout", {})},
        "data": {"train": [{"path": write_jsonl(folder / "rows.jsonl", rows(*words))}], **changes.get("data", {})},
        "train": {"steps": changes.get("steps", 1), "micro_batch": 2, **({} if task == "rl" else {"batch": 2})},
        "checkpoint": {"every": 1, "save_hf": False},
        "tracking": {"console": "plain"},
    }
    polls = iter([0] * asked if asked else [])

    def poll(self: Requests) -> int:
        self.reason = "a test"
        return next(polls, STOP if asked else 0)

    Requests.poll = poll  # type: ignore[method-assign]
    said, refusal = io.StringIO(), ""
    with ExitStack() as cleanup, contextlib.redirect_stdout(said):
        try:
            TASKS[task](parse_config(tree), world, changes.get("resume", "auto"), cleanup)
        except ValueError as error:
            refusal = str(error)
        except SystemExit:
            pass
    return said.getvalue(), refusal


def start(models: Path, task: str, words: list[int], asked: int = 0, **changes: Any) -> tuple[str, str]:
    said, refusal = run_ranks(started, 1, models, task, words, changes, asked)[0]
    return said, refusal


def test_a_fresh_start_in_a_used_folder_keeps_what_is_there(models: Path) -> None:
    folder = models.parent / "going-on-rl" / "used"
    start(models, "rl", [5, 6, 8, 11], steps=2, run="used")
    said, _ = start(models, "rl", [5, 6, 8, 11], steps=1, run="used", resume="never")
    assert (
        f"2 checkpoints of an earlier run are kept in {folder}/checkpoints-1" in said
        and f"samples of an earlier run are kept in {folder}/samples-1" in said
    )
    kept, new = ({file.name for file in (folder / name).iterdir()} for name in ("samples-1", "samples"))
    assert kept == {"training-000001.jsonl", "training-000002.jsonl"} and new == {"training-000001.jsonl"}
    assert (folder / "checkpoints-1" / "checkpoint-2").is_dir() and state(folder)["step"] == 1


def test_a_step_past_the_new_end_is_said_to_be(models: Path) -> None:
    changes: dict[str, Any] = {"steps": 3, "run": "shorter"}
    start(models, "rl", [5, 6, 8, 11], asked=5, **changes)
    folder = models.parent / "going-on-rl" / "shorter"
    left = (folder / "checkpoints" / "latest").resolve().name
    begun, part = (int(number) for number in left.removeprefix("checkpoint-").split("+"))
    assert begun >= 1 and part
    said, _ = start(models, "rl", [5, 6, 8, 11], **(changes | {"steps": 1}))
    assert f"nothing is left to do: it was inside of step {begun + 1}, and train.steps is 1" in said


def state(folder: Path, name: str = "latest") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "checkpoints" / name / "trainer_state.json").read_text())
    return found


@pytest.mark.parametrize("task", TASKS)
def test_other_rows_are_refused_unless_they_are_wanted(models: Path, task: str) -> None:
    folder = models.parent / f"going-on-{task}" / "run"
    start(models, task, [5, 6, 8])
    assert state(folder)["data"]["rows"] == 3
    recipe = (folder / "config.yaml").read_text()

    _, refusal = start(models, task, [5, 6, 10], steps=2)
    assert refusal.startswith("data.train: 3 rows, and not those that") and "checkpoint-1 was trained on (3)" in refusal
    assert "data.on_change=accept" in refusal and "--resume never" in refusal
    if task == "sft":
        assert start(models, task, [6, 5, 8], steps=2)[1] and start(models, task, [5, 6, 8, 10], steps=2)[1]  # in another order, and one more
        assert "trained parameters are in the checkpoint or in the model only" in start(models, task, [5, 6, 8], role={"lora": {"r": 2}})[1]
    assert (folder / "config.yaml").read_text() == recipe and state(folder)["step"] == 1

    said, refusal = start(models, task, [5, 6, 8, 10], steps=2, data={"on_change": "accept"}, role={"learning_rate": 1e-4})
    assert not refusal and "going on after step 1" in said
    assert {line.partition("since then: ")[2] for line in said.splitlines() if "since then" in line} == {
        f"{ROLES[task]}.learning_rate: 1e-06 -> 0.0001",
        'data.on_change: "error" -> "accept"',
        "train.steps: 1 -> 2",
    }
    assert state(folder)["step"] == 2 and state(folder)["data"]["rows"] == 4 and "on_change: accept" in (folder / "config.yaml").read_text()


def test_a_step_that_had_begun_with_other_rows_begins_anew(models: Path) -> None:
    """Asked to leave after the rollout of step 2, it goes on with that rollout; with other rows it draws another."""
    folder = models.parent / "going-on-rl" / "begun"
    changes: dict[str, Any] = {"steps": 2, "data": {"on_change": "accept", "shuffle": False}, "run": "begun"}
    start(models, "rl", [5, 6, 8, 11], asked=5, **changes)
    left = (folder / "checkpoints" / "latest").resolve().name
    assert left.startswith("checkpoint-1+"), left
    said, _ = start(models, "rl", [20, 21, 22, 23, 24], **changes)
    assert "what step 2 had finished was of other rows: it begins anew" in said
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 2 and line["prompt_length/mean"] == 3  # the rollout that was thrown away has prompts of two tokens
    samples = [json.loads(line)["prompt"] for line in (folder / "samples" / "training-000002.jsonl").read_text().splitlines()]
    assert samples == ["w22 w9 w4"] * 2 + ["w23 w9 w4"] * 2


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("rollout", "prompts", 1),
        pytest.param("rollout", "prompts", 3, marks=pytest.mark.slow),
        pytest.param("algorithm", "minibatches", 4, marks=pytest.mark.slow),
        ("rollout", "max_batch", 1),
    ],
)
def test_a_step_that_had_begun_by_another_plan_begins_anew(models: Path, section: str, key: str, value: int) -> None:
    """One of its two updates is done: with other prompts or minibatches it would train some rows twice or never, or look for rows that there are
    not. How many are decoded at once makes no difference, and the step goes on."""
    folder, run = models.parent / "going-on-rl" / f"plan-{key}-{value}", f"plan-{key}-{value}"
    changes: dict[str, Any] = {"steps": 2, "run": run, "algorithm": {"minibatches": 2}}
    start(models, "rl", [5, 6, 8, 11], asked=4, **changes)
    left = (folder / "checkpoints" / "latest").resolve().name
    assert left.startswith("checkpoint-0+"), left
    said, refusal = start(models, "rl", [5, 6, 8, 11], **(changes | {section: {**changes.get(section, {}), key: value}}))
    assert not refusal and state(folder)["step"] == 2
    if key == "max_batch":
        assert "going on inside of step 1" in said
    else:
        assert f"what step 1 had finished was with another {section}.{key}: it begins anew" in said
        rows = 2 * (value if key == "prompts" else 2)
        assert len((folder / "samples" / "training-000001.jsonl").read_text().splitlines()) == rows
