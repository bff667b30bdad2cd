"""One rank stops, hangs, is slow or goes astray: the others name it, and the job ends. Real runs on two ranks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlhf.watchdog import EXIT_STALLED
from tests.e2e.programs import environment, free_port, make_model, metrics, reversal_rows, write_jsonl, write_recipe

pytestmark = pytest.mark.timeout(300)
PROGRAM = Path(__file__).with_name("program.py")
ROOT = PROGRAM.parents[2]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chaos")
    make_model(folder / "base")
    write_jsonl(folder / "rows.jsonl", reversal_rows(60))
    write_jsonl(folder / "held_out.jsonl", reversal_rows(8, seed=1))
    return folder


def recipe_of(folder: Path, name: str, task: str, stall: float, stage: int = 3, **train: Any) -> Path:
    tree: dict[str, Any] = {
        "task": task,
        "run_dir": folder / "runs" / name,
        "threads": 1,
        "deepspeed": {"zero_optimization": {"stage": stage}},
        "actor": {"path": folder / "base", "learning_rate": 1e-3},
        "data": {"train": {"path": folder / "rows.jsonl"}},
        "validation": {"data": {"path": folder / "held_out.jsonl"}, "every": 2, "before_training": False},
        "train": {"steps": 4, "micro_batch": 8, "stall_minutes": stall / 60, **train},
        "checkpoint": {"every": 2, "save_hf": False},
        "tracking": {"console": "plain"},
    }
    if task == "rl":
        tree |= {
            "reward": {"components": [{"function": "exact_match"}]},
            "rollout": {"prompts": 8, "group_size": 2, "max_new_tokens": 6},
            "algorithm": {"name": "grpo", "kl": {"coef": 0.01}},
        }
        tree["validation"]["verifier"] = "exact_match"
    else:
        tree["train"]["batch"] = 16
    return write_recipe(folder / f"{name}.yaml", tree)


@dataclass
class Ended:
    codes: list[int]
    outputs: list[str]
    seconds: float  # from the mischief to the end of the last rank
    run_dir: Path

    def stacks(self, rank: int) -> str:
        (file,) = self.run_dir.glob(f"stalls/*/rank-{rank}.txt")
        return file.read_text()


def run(folder: Path, recipe: Path, mischief: dict[str, Any], timeout: float = 120) -> Ended:
    stopped = recipe.with_suffix(".stopped")
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONHASHSEED": "0"}
    env = environment(**both, MISCHIEF=json.dumps(mischief), STOPPED=str(stopped), PYTHONPATH=str(ROOT))
    logs = [recipe.with_suffix(f".{rank}.log") for rank in range(2)]
    started = []
    for rank, log in enumerate(logs):
        with log.open("w") as out:
            command = [sys.executable, str(PROGRAM), "--config", str(recipe)]
            started.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
    try:
        for process in started:
            process.wait(timeout)
    finally:
        for process in started:
            process.kill()
    seconds = time.time() - stopped.stat().st_mtime if stopped.exists() else 0.0
    return Ended([p.returncode for p in started], [log.read_text() for log in logs], seconds, folder / "runs" / recipe.stem)


def check_stopped(folder: Path, task: str, phase: str, step: int, rank: int, what: str, stall: float, within: float) -> Ended:
    name = f"{what}-{task}-{phase}-{rank}"
    ended = run(folder, recipe_of(folder, name, task, stall), {"rank": rank, "what": what, "phase": phase, "step": step})
    survivor = ended.outputs[1 - rank]
    said = re.search(rf"error \(rank {1 - rank}\): .*", survivor)
    assert said, survivor
    assert f"rank {rank} (host" in said[0] and f"rank {1 - rank} (host" not in said[0], said[0]
    assert f"in phase {phase} of step {step}" in said[0], said[0]
    assert ended.codes == [EXIT_STALLED, EXIT_STALLED], ended
    assert ended.seconds < within, ended.seconds
    assert "in act" in ended.stacks(rank), ended.stacks(rank)  # where it was made to stop
    assert "most recent call first" in ended.stacks(1 - rank)
    return ended


def test_rank_0_stops_and_with_it_the_store(folder: Path) -> None:
    ended = check_stopped(folder, "rl", "update_actor", 2, 0, "stop", 6, 20)
    assert "State:\tT (stopped)" in ended.stacks(0)


def test_rank_that_hangs_is_told_from_those_that_wait(folder: Path) -> None:
    """Both are alive and make no progress."""
    check_stopped(folder, "sft", "testing", 2, 1, "hang", 6, 20)


RL = [("set-up", 0), ("gen", 1), ("ref", 2), ("update_actor", 2), ("testing", 2), ("save_checkpoint", 2)]
SFT = [("set-up", 0), ("update_actor", 1), ("testing", 2), ("save_checkpoint", 2)]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("task", "phase", "step"), [("rl", *place) for place in RL] + [("sft", *place) for place in SFT])
def test_stopped_anywhere(folder: Path, task: str, phase: str, step: int, rank: int) -> None:
    ended = check_stopped(folder, task, phase, step, rank, "stop", 12, 18)
    print(f"{task} {phase} rank {rank}: over after {ended.seconds:.1f} s")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("phase", "step"), RL)
def test_hangs_anywhere(folder: Path, phase: str, step: int, rank: int) -> None:
    check_stopped(folder, "rl", phase, step, rank, "hang", 12, 18)


def test_slow_rank_is_named(folder: Path) -> None:
    recipe = recipe_of(folder, "slow", "rl", 60, micro_batch=2)
    ended = run(folder, recipe, {"rank": 1, "what": "slow"})
    assert ended.codes == [0, 0], ended.outputs
    lines = metrics(ended.run_dir)
    for phase in ("gen", "update_actor"):
        assert [line[f"perf/straggler/{phase}/rank"] for line in lines] == [1.0] * 4, lines
        assert all(line[f"perf/straggler/{phase}/ratio"] > 1.5 for line in lines), lines
        assert re.search(rf"rank 1 \(host \S+, process \d+\) is slow: in phase {phase}", ended.outputs[0].split("step 4/4")[0]), ended.outputs[0]
    assert "rank 0 (host" not in ended.outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "stage", "found"),
    [
        ("rate", 3, r"after step 2: actor: learning rate is \[0.001, 0.001\] on rank 0 .*, \[0.5, 0.5\] on rank 1 \(host"),
        ("weights", 0, r"after step 2: actor: weights of \S+ is -?\d+ on rank 0 .*, -?\d+ on rank 1 \(host"),
        ("recipe", 3, r"at the start: config.train.steps is 4 on rank 0 .*, 9 on rank 1 \(host"),
    ],
)
def test_ranks_that_go_astray(folder: Path, what: str, stage: int, found: str) -> None:
    ended = run(folder, recipe_of(folder, what, "sft", 60, stage, digest_every=2), {"rank": 1, "what": what, "step": 2})
    assert ended.codes == [1, 1], ended.outputs
    for out in ended.outputs:
        assert re.search(f"RuntimeError: the ranks are not in the same state {found}", out), out
    assert not list(ended.run_dir.glob("checkpoints/checkpoint-*"))
