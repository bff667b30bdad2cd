"""One rank and two, python, deepspeed, torchrun and accelerate: the same program, the same tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Finished, Ground, ppo_recipe
from tests.e2e.programs import ROOT, environment, metrics, sample_files, steps, succeed

pytestmark = pytest.mark.timeout(600)


def tokens(prefix: Path, ranks: int, rows: int) -> list[Any]:
    """(prompt, token ids) of the first `rows` responses of each rank as the reward function saw them, which is as they ended; sorted."""
    found = []
    for rank in range(ranks):
        calls = [json.loads(line) for line in Path(f"{prefix}-{rank}").read_text().splitlines()]
        seen = [row for call in calls for row in call]
        assert len(seen) >= rows
        found += seen[:rows]
    return sorted(found, key=json.dumps)


def test_one_rank_samples_what_two_do(grpo: Finished, ground: Ground) -> None:
    """trap 25: the same token ids over six steps in fp32, after five updates of the weights, and the same sample files."""
    env = {**ground.env, "RECORD_TOKENS": str(ground.folder / "tokens-1")}
    run_dir = ground.run_dir("grpo-one-rank")
    succeed(grpo.recipe, f"run_dir={run_dir}", "train.steps=6", launcher="python", env=env)
    rows = sum(len(json.loads(line)) for line in (ground.folder / "tokens-1-0").read_text().splitlines())
    one, two = tokens(ground.folder / "tokens-1", 1, rows), tokens(ground.folder / "tokens-2", 2, rows // 2)
    assert one == two
    assert len({json.dumps(row) for row in one}) > 100
    ours, theirs = sample_files(run_dir), sample_files(grpo.run_dir)
    assert len(ours) == 6
    for name, content in ours.items():
        a, b = ([json.loads(line) for line in file.splitlines()] for file in (content, theirs[name]))
        for x, y in zip(a, b, strict=True):
            assert x.pop("advantage") == pytest.approx(y.pop("advantage"), abs=1e-5)
            assert x == y


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_other_launchers(launcher: str, grpo: Finished, ground: Ground) -> None:
    """Two ranks started by others: the same samples, bit for bit, as under deepspeed."""
    run_dir = ground.run_dir(f"grpo-{launcher}")
    env = {**ground.env, "RECORD_TOKENS": str(ground.folder / f"tokens-{launcher}")}
    succeed(grpo.recipe, f"run_dir={run_dir}", "train.steps=2", launcher=launcher, env=env)
    assert steps(run_dir) == [1, 2]
    assert json.loads((run_dir / "checkpoints" / "latest" / "trainer_state.json").read_text())["world_size"] == 2
    ours = sample_files(run_dir)
    assert ours == {name: content for name, content in sample_files(grpo.run_dir).items() if name in ours}


@pytest.mark.slow
def test_ppo_on_one_rank_samples_what_two_do(ppo: Finished, ground: Ground) -> None:
    run_dir = ground.run_dir("ppo-one-rank")
    succeed(ppo.recipe, f"run_dir={run_dir}", launcher="python", env=ground.env)
    for step, (one, two) in enumerate(zip(metrics(run_dir)[1:7], metrics(ppo.run_dir)[1:7], strict=True), 1):
        a, b = (sample_files(d)[f"training-{step:06d}.jsonl"].splitlines() for d in (run_dir, ppo.run_dir))
        texts = [[(row["prompt"], row["completion"], row["length"], row["draw"]) for row in map(json.loads, lines)] for lines in (a, b)]
        assert texts[0] == texts[1]
        assert one["actor/grad_norm"] == pytest.approx(two["actor/grad_norm"], rel=1e-4)


DRY_RUN = """
import runpy, sys, time
sys.argv = {arguments!r}
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as exit:
    print("exit code", exit.code)
import torch
print("process group", torch.distributed.is_initialized())
print("deepspeed imported", "deepspeed" in sys.modules)
"""


def test_dry_run(ground: Ground, sft: Finished, reward_model: Finished) -> None:
    """Config, arithmetic, placement and DeepSpeed settings of all four models; no process group, no run folder; --local_rank is accepted."""
    import subprocess

    recipe = ground.recipe("dry", ppo_recipe(ground, sft.hf, reward_model.hf))
    arguments = [str(ROOT / "train_rlhf.py"), "--config", str(recipe), "--local_rank", "0", "--dry_run", "actor.learning_rate=3e-5"]
    script = DRY_RUN.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(**ground.env), timeout=100, check=True)
    out = done.stdout
    assert "exit code 0" in out and "process group False" in out and "deepspeed imported False" in out
    assert "learning_rate: 3.0e-05" in out
    assert "one rollout batch = 32 prompts x 2 samples = 64 responses of at most 6 tokens" in out
    assert "one step = 2 epochs x 2 minibatches = 4 optimizer steps" in out
    for role in ("actor", "critic", "reference", "reward_model"):
        assert f"  {role}: " in out, role
    assert out.count("ZeRO-3: sharded over all ranks") == 4
    assert "Traceback" not in done.stderr
    assert not ground.run_dir("dry").exists()
