"""A rank that runs out of memory in the middle of a run: all ranks end with the exit code that means `start me again`, and the next start fits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.distributed import EXIT_AGAIN
from tests.e2e.conftest import Ground
from tests.e2e.programs import ROOT, checkpoints, environment, free_port, steps

pytestmark = pytest.mark.timeout(300)

OUT_OF_MEMORY = '''
"""On rank 1 memory runs out in every forward of the update with more than ROOM tokens, from step 2 on, while rank 0 waits for it in a collective."""

import os

import torch

import rlhf.trainers.rl

whole, room = rlhf.trainers.rl.policy_loss, int(os.environ["ROOM"])


def policy_loss(forward, batch, *arguments):
    if rlhf.trainers.rl.learnt and sum(batch.prompt_lengths + batch.response_lengths) > room:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB.")
    return whole(forward, batch, *arguments)


def learn(*arguments):
    found = whole_learn(*arguments)
    rlhf.trainers.rl.learnt = True
    return found


def zero(completions, **columns):
    return [float(len(text)) for text in completions]


if os.environ["RANK"] == "1":
    rlhf.trainers.rl.learnt = False
    rlhf.trainers.rl.policy_loss, whole_learn, rlhf.trainers.rl.learn = policy_loss, rlhf.trainers.rl.learn, learn
'''


def ranks(recipe: Path, *arguments: str, env: dict[str, str]) -> list[tuple[int, str]]:
    """(exit code, output) of both ranks of `train_rlhf.py`, each started by itself."""
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **env}
    command = [sys.executable, str(ROOT / "train_rlhf.py"), "--config", str(recipe), *arguments]
    started = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(**both) | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        found = [(process, process.communicate(timeout=120)[0]) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, out) for process, out in found]


def recipe_of(ground: Ground, name: str, **train: Any) -> Path:
    (ground.folder / "python" / "e2e_out_of_memory.py").write_text(OUT_OF_MEMORY)
    return ground.recipe(
        name,
        {
            "task": "rl",
            "actor": {"path": ground.folder / "base", "learning_rate": 1e-3},
            "data": {"train": {"path": ground.folder / "rows.jsonl"}},
            "reward": {"components": [{"function": "e2e_out_of_memory:zero"}]},
            "rollout": {"prompts": 8, "group_size": 4, "max_new_tokens": 6},
            "algorithm": {"name": "grpo"},
            "train": {"steps": 3, **train},
            "checkpoint": {"every": 1},
        },
    )


def test_started_again_with_a_smaller_budget(ground: Ground) -> None:
    recipe, run_dir = recipe_of(ground, "memory", micro_batch=8), ground.run_dir("memory")
    env = {**ground.env, "ROOM": "60"}  # eight rows of at most ten tokens do not fit, four do
    done = ranks(recipe, env=env)
    assert [code for code, _ in done] == [EXIT_AGAIN, EXIT_AGAIN], done
    assert json.loads((run_dir / "budget.json").read_text()) == {"train.micro_batch": 4}
    message = done[1][1]
    for part in ("error (rank 1): out of memory in phase update_actor: CUDA out of memory", "planned for it:", "train.micro_batch=4"):
        assert part in message, message
    assert "Traceback" not in done[0][1] + message
    assert checkpoints(run_dir) == [1]

    done = ranks(recipe, "--resume", "auto", env=env)
    assert [code for code, _ in done] == [0, 0], done
    assert steps(run_dir) == [1, 2, 3]
    assert not list(run_dir.glob(".budget*"))


@pytest.mark.slow
def test_what_was_chosen_becomes_smaller_too(ground: Ground) -> None:
    recipe, run_dir = recipe_of(ground, "memory-auto", micro_batch_tokens="auto"), ground.run_dir("memory-auto")
    done = ranks(recipe, env={**ground.env, "ROOM": "60"})
    assert [code for code, _ in done] == [EXIT_AGAIN, EXIT_AGAIN], done
    budget = {"chosen": {"train.micro_batch_tokens": 16_384}, "train.micro_batch_tokens": 13_056}
    assert json.loads((run_dir / "budget.json").read_text()) == budget
    done = ranks(recipe, env={**ground.env, "ROOM": "16384"})
    assert [code for code, _ in done] == [0, 0], done
    assert "auto: train.micro_batch_tokens=13056: from budget.json" in done[0][1] and steps(run_dir) == [1, 2, 3]
    assert json.loads((run_dir / "budget.json").read_text()) == budget


@pytest.mark.slow
def test_nothing_can_be_smaller(ground: Ground) -> None:
    done = ranks(recipe_of(ground, "memory-least", micro_batch=1), "rollout.release=true", env={**ground.env, "ROOM": "2"})
    assert [code for code, _ in done] == [2, 2], done
    assert "error (rank 1): out of memory in phase 'update_actor', and train.micro_batch cannot be smaller" in done[1][1], done[1][1]
    assert not (ground.run_dir("memory-least") / "budget.json").exists()
