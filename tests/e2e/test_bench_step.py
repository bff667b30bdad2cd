"""scripts/bench_step.py runs every algorithm through the program's own functions; its figures mean nothing on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from torch.autograd.profiler_util import DeviceType

from rlhf.config import ROOT
from scripts import bench_step


@pytest.mark.parametrize(
    ("options", "phases"),
    [
        (
            ["--algorithm", "ppo", "--checkpointing", "--zero", "2", "--offload"],
            {"gen", "ref", "values", "update_actor", "update_critic", "hand_over"},
        ),
        pytest.param(
            ["--lora", "4", "--no_reference", "--reward_ms", "1", "--checkpointing", "mlp", "--minibatches", "2"],
            {"gen", "reward", "old_log_prob", "update_actor", "hand_over"},
            marks=pytest.mark.slow,
        ),
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
    found = {line["phase"]: line for line in lines if line.get("bench") == "phase"}
    spent = {phase: line["seconds"] for phase, line in found.items()}
    assert phases | {"step"} <= spent.keys() and all(spent[phase] > 0 for phase in phases - {"reward"})  # scorers may be done by then
    assert {name for name in ("ref", "values", "update_critic") if spent.get(name)} == phases & {"ref", "values", "update_critic"}
    working = phases - {"reward", "hand_over"} | {"step"}
    assert all(found[phase][figure] > 0 for phase in working for figure in ("tok_s_gpu", "mfu", "share_of_bound"))
    assert 0 < next(line["value"] for line in lines if line.get("bench") == "step" and line["metric"] == "seconds") < 60


def test_busy_shares_of_a_profile(capsys: pytest.CaptureFixture[str]) -> None:
    """Kernels that overlap count once, what goes on from one phase into the next in both, and annotations not at all."""

    def event(name: str, kind: DeviceType, start: float, end: float) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(start=start, end=end))

    gpu, cpu = DeviceType.CUDA, DeviceType.CPU
    events = [event("phase gen", kind, 0, 100) for kind in (cpu, gpu)] + [event("phase ref", cpu, 100, 200), event("aten::mm", cpu, 0, 200)]
    events += [event("decode", gpu, 10, 40), event("copy", gpu, 30, 50), event("gemm", gpu, 90, 150), event("Optimizer.step", gpu, 0, 200)]
    shares = bench_step.report_profile(SimpleNamespace(events=lambda: events), 200e-6, 2, SimpleNamespace(is_main=True))  # type: ignore[arg-type]
    assert shares == {"gen": 0.5, "ref": 0.5, "step": 0.5}
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["gemm", "decode"]


def test_kernels_beside_torchs() -> None:
    command = [sys.executable, "scripts/bench_kernels.py", "--shape", "tiny", "--tokens", "64", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = {line["case"]: line for line in map(json.loads, (text for text in done.stdout.splitlines() if text.startswith("{")))}
    pieces = ("head", "frozen head", "norm", "activation", "rotary")
    assert all(lines[f"{piece} tiny, {who}"]["value"] > 0 for piece in pieces for who in ("own", "torch"))
    assert lines["head tiny, own"]["over_products"] > 1
