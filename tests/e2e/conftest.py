"""One run for many assertions: starting a launcher costs more than the training."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.e2e.programs import SHARDED, Outcome, make_model, preference_rows, reversal_rows, succeed, write_jsonl, write_recipe
from tests.e2e.rows import MALFORMED

REWARDS = '''
"""Reward functions of the end-to-end tests, found through PYTHONPATH."""

import json
import os


def letter_a(completions, **columns):
    """How much of the response is the letter a."""
    return [text.count("a") / 6 for text in completions]


def early_letters(completions, **columns):
    """Share of letters before n; -1 for an empty response. Raises for some prompts, None for others."""
    prompts = columns["prompts"]
    if any("z" in prompt for prompt in prompts):
        raise ValueError("z is not judged")
    return [None if "y" in prompt else sum(c < "n" for c in text) / len(text) if text else -1.0 for prompt, text in zip(prompts, completions)]


def record(prompts, completion_ids, **columns):
    """0 for everything, and the token ids into a file, a line per call."""
    with open(os.environ["RECORD_TOKENS"] + "-" + os.environ["RANK"], "a") as file:
        file.write(json.dumps([[p, ids] for p, ids in zip(prompts, completion_ids)]) + "\\n")
    return [0.0] * len(prompts)
'''

BROKEN_RANK = '''
"""On rank 1 the update breaks, while rank 0 waits for it in a collective."""

import os

import rlhf.trainers.rl


def broken(*arguments):
    raise RuntimeError("rank one breaks here")


def zero(completions, **columns):
    return [float(len(text)) for text in completions]


if os.environ["RANK"] == "1":
    rlhf.trainers.rl.policy_loss = broken
'''


@dataclass
class Ground:
    """A folder with everything that recipes point at."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        return {"PYTHONPATH": str(self.folder / "python")}

    def recipe(self, name: str, tree: dict[str, Any]) -> Path:
        return write_recipe(self.folder / f"{name}.yaml", {"run_dir": self.folder / "runs" / name, "threads": 1, **tree})

    def run_dir(self, name: str) -> Path:
        return self.folder / "runs" / name


@dataclass
class Finished:
    run_dir: Path
    recipe: Path
    outcome: Outcome

    @property
    def hf(self) -> Path:
        return self.run_dir / "checkpoints" / "latest" / "hf"


def once(ground: Ground, name: str, make: Callable[[], Finished]) -> Finished:
    """Made by whichever of the test processes comes first."""
    kept = ground.folder / f"{name}.pickle"
    with FileLock(ground.folder / f"{name}.lock"):
        if not kept.exists():
            kept.write_bytes(pickle.dumps(make()))
    return pickle.loads(kept.read_bytes())  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    """The same for all test processes."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "e2e"
    with FileLock(folder.with_name("e2e.lock")):
        if not folder.exists():
            make_ground(folder.with_name("e2e.new"))
            folder.with_name("e2e.new").rename(folder)
    return Ground(folder)


def make_ground(folder: Path) -> None:
    folder.mkdir()
    make_model(folder / "base")
    make_model(folder / "ends", eos_by_prompt=True)
    make_unreadable(make_model(folder / "unreadable"))
    write_jsonl(folder / "rows.jsonl", reversal_rows(400))
    write_jsonl(folder / "held_out.jsonl", reversal_rows(100, seed=1))
    write_jsonl(folder / "pairs.jsonl", preference_rows(400))
    write_jsonl(folder / "held_out_pairs.jsonl", preference_rows(200, seed=1))
    rows: list[Any] = reversal_rows(200)
    for i, bad in enumerate(MALFORMED):
        rows.insert(5 * i, bad)
    (folder / "malformed.jsonl").write_bytes(b"".join(_bytes(row) + b"\n" for row in rows))
    (folder / "python").mkdir()
    (folder / "python" / "e2e_rewards.py").write_text(REWARDS)
    (folder / "python" / "e2e_broken_rank.py").write_text(BROKEN_RANK)


def make_unreadable(model: Path) -> None:
    """The same names and shapes, of a type that torch does not know: whoever reads a weight fails."""
    import json

    file = model / "model.safetensors"
    header, size, sixes = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")]), 0, {}
    for name, entry in header.items():
        if name != "__metadata__":
            end = size + math.prod(entry["shape"]) * 6 // 8
            sixes[name], size = {"dtype": "F6_E2M3", "shape": entry["shape"], "data_offsets": [size, end]}, end
    text = json.dumps(sixes).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))


def _bytes(row: Any) -> bytes:
    import json

    return row if isinstance(row, bytes) else json.dumps(row).encode()


def sft_recipe(ground: Ground, **changes: Any) -> dict[str, Any]:
    folder = ground.folder
    return {
        "task": "sft",
        "actor": {"path": folder / "base", "learning_rate": 4e-3, "schedule": "linear", "warmup_steps": 2},
        "data": {"train": {"path": folder / "rows.jsonl"}},
        "validation": {"data": {"path": folder / "held_out.jsonl"}, "every": 8},
        "train": {"steps": 24, "batch": 64, "micro_batch": 32},
        **changes,
    }


def ppo_recipe(ground: Ground, actor: Path, reward_model: Path, **changes: Any) -> dict[str, Any]:
    """Four models, each in its own role; the toy reward leads, the learned one has a say."""
    folder = ground.folder
    return {
        "task": "rl",
        "deepspeed": SHARDED,
        "actor": {"path": actor, "learning_rate": 2e-3, "schedule": "linear", "warmup_steps": 2},
        "critic": {"init": "reward", "learning_rate": 2e-3},
        "data": {"train": {"path": folder / "rows.jsonl"}},
        "reward": {"components": [{"function": "e2e_rewards:letter_a"}, {"model": {"path": reward_model}, "weight": 0.01, "clip": 2.0}]},
        "rollout": {"prompts": 32, "group_size": 2, "max_new_tokens": 6},
        "algorithm": {
            "name": "ppo",
            "kl": {"coef": 0.01, "controller": "adaptive", "target": 1.0, "horizon": 1000},
            "epochs": 2,
            "minibatches": 2,
        },
        "validation": {"data": {"path": folder / "held_out.jsonl", "size": 20}, "verifier": "exact_match", "every": 4, "samples": 1000},
        "train": {"steps": 12, "packing": True, "micro_batch_tokens": 256},
        "checkpoint": {"every": 1, "keep_last": 100},
        **changes,
    }


def grpo_recipe(ground: Ground, actor: Path, **changes: Any) -> dict[str, Any]:
    return {
        "task": "rl",
        "actor": {"path": actor, "learning_rate": 1e-2, "lora": {"r": 8}},
        "data": {"train": {"path": ground.folder / "rows.jsonl"}},
        "reward": {"components": [{"function": "e2e_rewards:letter_a"}, {"function": "e2e_rewards:record", "weight": 0}]},
        "rollout": {"prompts": 24, "group_size": 4, "max_new_tokens": 6},
        "algorithm": {"name": "grpo", "kl": {"coef": 0.01, "place": "loss", "estimator": "k3_corrected"}, "epochs": 2, "minibatches": 2},
        "validation": {"samples": 1000},
        "train": {"steps": 8, "micro_batch": 16},
        **changes,
    }


@pytest.fixture(scope="session")
def sft(ground: Ground) -> Finished:
    """Through the launcher, ZeRO-3, with bad rows left out, wandb offline, and a best checkpoint that is not the last."""
    recipe = sft_recipe(
        ground,
        data={"train": {"path": ground.folder / "malformed.jsonl"}, "on_bad_row": "skip"},
        validation={"data": {"path": ground.folder / "held_out.jsonl"}, "every": 8, "best_metric": "val-aux/perplexity", "best_mode": "max"},
        checkpoint={"every": 8, "keep_last": 1},
        tracking={"wandb": "offline", "timeout": 20},
    )
    path = ground.recipe("sft", recipe)
    return once(ground, "sft", lambda: Finished(ground.run_dir("sft"), path, succeed(path, env=ground.env)))


@pytest.fixture(scope="session")
def reward_model(ground: Ground, sft: Finished) -> Finished:
    """Through the launcher, ZeRO-3, with a wandb server that does not answer."""
    recipe = {
        "task": "reward_model",
        "reward_model": {"path": sft.hf, "learning_rate": 3e-3, "schedule": "linear"},
        "data": {"train": {"path": ground.folder / "pairs.jsonl"}},
        "validation": {"data": {"path": ground.folder / "held_out_pairs.jsonl"}, "every": 2},
        "train": {"steps": 30, "batch": 64, "micro_batch": 32, "packing": True},
        "tracking": {"wandb": "online", "timeout": 4},
    }
    path = ground.recipe("reward_model", recipe)
    env = {**ground.env, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    return once(ground, "reward_model", lambda: Finished(ground.run_dir("reward_model"), path, succeed(path, env=env)))


@pytest.fixture(scope="session")
def ppo(ground: Ground, sft: Finished, reward_model: Finished) -> Finished:
    path = ground.recipe("ppo", ppo_recipe(ground, sft.hf, reward_model.hf))
    return once(ground, "ppo", lambda: Finished(ground.run_dir("ppo"), path, succeed(path, env=ground.env)))


@pytest.fixture(scope="session")
def grpo(ground: Ground, sft: Finished) -> Finished:
    path = ground.recipe("grpo", grpo_recipe(ground, sft.hf))
    env = {**ground.env, "RECORD_TOKENS": str(ground.folder / "tokens-2")}
    return once(ground, "grpo", lambda: Finished(ground.run_dir("grpo"), path, succeed(path, env=env)))
