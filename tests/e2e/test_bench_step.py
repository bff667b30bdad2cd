"""scripts/bench_step.py runs every algorithm through the program's own functions; its figures mean nothing on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from rlhf.config import ROOT


@pytest.mark.parametrize(
    ("options", "phases"),
    [
        (
            ["--algorithm", "ppo", "--checkpointing", "--zero", "2", "--offload"],
            {"gen", "ref", "values", "update_actor", "update_critic", "hand_over"},
        ),
        (["--lora", "4", "--no_reference", "--reward_ms", "1", "--checkpointing", "mlp"], {"gen", "reward", "update_actor", "hand_over"}),
        pytest.param(["--compile", "--without", "packing"], {"gen", "ref", "update_actor", "hand_over"}, marks=pytest.mark.slow),
        pytest.param(
            ["--without", "packing", "head", "kernels", "layers", "together", "--zero_set", "reduce_bucket_size=1000"],
            {"gen", "ref", "update_actor", "hand_over"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_step_of_every_kind(options: list[str], phases: set[str]) -> None:
    command = [
        sys.executable,
        "scripts/bench_step.py",
        "--shape",
        "tiny",
        "--workload",
        "tiny",
        "--tokens",
        "256",
        "--max_batch",
        "16",
        "--steps",
        "1",
    ]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    spent = next(line for line in lines if line.get("bench") == "phases")
    assert phases <= spent.keys() and all(spent[phase] > 0 for phase in phases - {"reward"})  # scorers may be done by then
    assert {name for name in ("ref", "values", "update_critic") if spent.get(name)} == phases & {"ref", "values", "update_critic"}
    assert 0 < next(line["value"] for line in lines if line.get("bench") == "step" and line["metric"] == "seconds") < 60


def test_kernels_beside_torchs() -> None:
    command = [sys.executable, "scripts/bench_kernels.py", "--shape", "tiny", "--tokens", "64", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = {line["case"]: line for line in map(json.loads, (text for text in done.stdout.splitlines() if text.startswith("{")))}
    pieces = ("head", "frozen head", "norm", "activation", "rotary")
    assert all(lines[f"{piece} tiny, {who}"]["value"] > 0 for piece in pieces for who in ("own", "torch"))
    assert lines["head tiny, own"]["over_products"] > 1
