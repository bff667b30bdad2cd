"""A run that goes on from any boundary, between steps, between phases or inside of an epoch, ends with the bits of the run that was not stopped."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from rlhf.checkpoint import Mark
from rlhf.config import load_config
from rlhf.distributed import World
from rlhf.requests import SAVE, STOP, Requests
from rlhf.trainers.rl import train_rl
from tests.e2e.conftest import REWARDS
from tests.e2e.programs import SHARDED, engine_hashes, make_model, metrics, preference_rows, reversal_rows, sample_files, write_jsonl, write_recipe
from tests.helpers import run_ranks

pytestmark = pytest.mark.timeout(900)

CLOCK = ("time", "timing_s/", "tokens/", "model_flops/", "perf/", "rollout/throughput", "reward/latency_ms", "train/step_time_ms", "memory/")
STEPS = 3
PPO = {"name": "ppo", "kl": {"coef": 0.01, "controller": "adaptive", "target": 1.0, "horizon": 1000}, "epochs": 2, "minibatches": 2}
GRPO = {"name": "grpo", "kl": {"coef": 0.01, "place": "loss", "estimator": "k3"}}
CLASSES: dict[str, dict[str, Any]] = {
    "ppo, ZeRO-3": {"algorithm": PPO, "deepspeed": SHARDED},
    "grpo with LoRA, one update, ZeRO-2": {"algorithm": GRPO, "actor": {"lora": {"r": 4}}, "deepspeed": "ds_configs/zero2.json"},
    "ppo, one update, ZeRO-1": {"algorithm": {**PPO, "epochs": 1, "minibatches": 1}, "deepspeed": "ds_configs/zero1.json"},
    "grpo with LoRA, three epochs, ZeRO-0": {
        "algorithm": {**GRPO, "epochs": 3},
        "actor": {"lora": {"r": 4}},
        "deepspeed": {"zero_optimization": {"stage": 0}},
    },
    "ppo, bf16, ZeRO-3": {"algorithm": PPO, "deepspeed": SHARDED, "actor": {"dtype": "bfloat16"}, "critic": {"dtype": "bfloat16"}},
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("boundaries")
    make_model(folder / "base")
    write_jsonl(folder / "rows.jsonl", reversal_rows(200))
    write_jsonl(folder / "held_out.jsonl", reversal_rows(40, seed=1))
    write_jsonl(folder / "pairs.jsonl", preference_rows(40))
    (folder / "python").mkdir()
    (folder / "python" / "e2e_rewards.py").write_text(REWARDS)
    return folder


def recipe_of(ground: Path, name: str) -> Path:
    changes = CLASSES[name]
    critic = {"critic": {"init": "actor", "learning_rate": 2e-3, **changes.get("critic", {})}} if changes["algorithm"]["name"] == "ppo" else {}
    recipe = {
        "task": "rl",
        "run_dir": ground / "unset",
        "threads": 1,
        "data": {"train": {"path": ground / "rows.jsonl"}},
        "reward": {"components": [{"function": "e2e_rewards:early_letters"}]},
        "rollout": {"prompts": 8, "group_size": 2, "max_new_tokens": 6},
        "validation": {"data": {"path": ground / "held_out.jsonl", "size": 8}, "verifier": "exact_match", "every": 2},
        "train": {"steps": STEPS, "packing": True, "micro_batch_tokens": 64},
        "checkpoint": {"save_hf": False, "keep_last": 1000},
        **changes,
        **critic,
        "actor": {"path": ground / "base", "learning_rate": 2e-3, "schedule": "linear", **changes.get("actor", {})},
    }
    return write_recipe(ground / f"{name.replace(' ', '-')}.yaml", recipe)


def train(world: World, ground: Path, recipe: Path, run_dir: Path, resume: str, asked: list[int]) -> int:
    """asked: what each boundary is asked for, the last one for all that follow; the exit code."""
    import sys

    sys.path.insert(0, str(ground / "python"))
    os.chdir(ground)
    polls = iter(asked)

    def poll(self: Requests) -> int:
        self.reason = "a test"
        return next(polls, asked[-1])

    Requests.poll = poll  # type: ignore[method-assign]
    try:
        with ExitStack() as cleanup:
            train_rl(load_config(recipe, [f"run_dir={run_dir}"]), world, resume, cleanup)
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def outcome(run_dir: Path) -> tuple[Any, ...]:
    """Weights and optimizer states, samples of every step, and all that was measured."""
    last = run_dir / "checkpoints" / f"checkpoint-{STEPS}"
    lines = [{k: v for k, v in line.items() if not k.startswith(CLOCK)} for line in metrics(run_dir)]
    return engine_hashes(last), sample_files(run_dir, after=1), lines


def marks(run_dir: Path) -> list[Mark]:
    return sorted(mark for p in (run_dir / "checkpoints").iterdir() if not p.is_symlink() and (mark := Mark.of(p)))


def all_boundaries(ground: Path, name: str, ranks: int = 2) -> tuple[Path, Path]:
    """(recipe, run folder) of a run that was saved at every boundary."""
    recipe, straight = recipe_of(ground, name), ground / name / "straight"
    if not straight.exists():
        assert run_ranks(train, ranks, ground, recipe, straight, "never", [SAVE]) == [0] * ranks
    return recipe, straight


def goes_on(ground: Path, name: str, mark: Mark) -> None:
    recipe, straight = all_boundaries(ground, name)
    run_dir = ground / name / mark.folder
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "checkpoints" / mark.folder).symlink_to(straight / "checkpoints" / mark.folder)
    kept = [line for line in (straight / "metrics.jsonl").read_text().splitlines(keepends=True) if json.loads(line)["step"] <= mark.step]
    (run_dir / "metrics.jsonl").write_text("".join(kept))
    (run_dir / "samples").mkdir()
    for step in range(1, mark.step + 1):
        file = Path("samples") / f"training-{step:06d}.jsonl"
        (run_dir / file).write_bytes((straight / file).read_bytes())
    assert run_ranks(train, 2, ground, recipe, run_dir, "auto", [0]) == [0, 0]
    assert outcome(run_dir) == outcome(straight), mark


def test_saving_at_every_boundary_changes_nothing(ground: Path) -> None:
    recipe, straight = all_boundaries(ground, "ppo, ZeRO-3")
    assert run_ranks(train, 2, ground, recipe, ground / "undisturbed", "never", [0]) == [0, 0]
    assert outcome(ground / "undisturbed") == outcome(straight)
    found = marks(straight)
    # rollout, reference, values, scores, old logprobs; four times actor and critic; every second time and at the end a validation
    assert [sum(mark.step == step and mark.part > 0 for mark in found) for step in range(STEPS)] == [13, 14, 14]


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        ("ppo, ZeRO-3", Mark(1, 1)),  # the rollout alone
        ("ppo, ZeRO-3", Mark(1, 8)),  # inside of the first epoch: the actor has learnt, the critic not
        ("ppo, ZeRO-3", Mark(1, 14)),  # everything but the validation that has been
        ("grpo with LoRA, one update, ZeRO-2", Mark(0, 5)),  # the update gave the old logprobs
    ],
)
def test_some_boundaries(ground: Path, name: str, mark: Mark) -> None:
    goes_on(ground, name, mark)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", CLASSES)
def test_every_boundary(ground: Path, name: str) -> None:
    _, straight = all_boundaries(ground, name)
    found = [mark for mark in marks(straight) if mark < Mark(STEPS)]
    for mark in found:
        if not (ground / name / mark.folder).exists():
            goes_on(ground, name, mark)
    print(f"{name}: {len(found)} of {len(found)} boundaries")


@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_left_inside_of_a_step_with_two_ranks_and_gone_on_with_others(ground: Path, ranks: int) -> None:
    """The same weights, so the same next samples; what follows may round otherwise."""
    recipe, straight = all_boundaries(ground, "ppo, ZeRO-3")
    run_dir = ground / f"{ranks} ranks"
    assert run_ranks(train, 2, ground, recipe, run_dir, "never", [0] * 8 + [STOP]) == [75, 75]
    assert marks(run_dir) == [Mark(0, 9)]
    assert run_ranks(train, ranks, ground, recipe, run_dir, "auto", [0]) == [0] * ranks
    assert sample_files(run_dir)["training-000001.jsonl"] == sample_files(straight)["training-000001.jsonl"]
    ours, theirs = ([line["actor/pg_loss"] for line in metrics(folder) if line["step"]] for folder in (run_dir, straight))
    assert ours == pytest.approx(theirs, abs=1e-4)
