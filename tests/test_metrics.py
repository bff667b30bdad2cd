"""Metrics: sinks that never stop a run, times, model operations and intervals against hand-computed numbers."""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPT2Config, LlamaConfig

from rlhf.config import TrackingConfig, parse_config
from rlhf.metrics import (
    Console,
    MetricsLog,
    PhaseTimer,
    bootstrap_interval,
    difference_interval,
    forward_flops,
    model_shape,
    peak_flops,
    rollout_flops,
    update_flops,
    wilson_interval,
    write_samples,
)
from rlhf.models.checkpointing import decoder_layers
from rlhf.trainers import validation
from tests.test_memory import FAMILIES_AND_OTHERS

ROOT = Path(__file__).resolve().parent.parent
OFF = TrackingConfig()


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ metrics.jsonl


def test_log_writes_one_line_per_call(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run", OFF, {}, None, active=True)
    log.log(1, {"a": 0.5, "b": float("nan"), "c": float("inf")})
    (line,) = read_lines(tmp_path / "run" / "metrics.jsonl")  # flushed before close
    assert line.pop("time") == pytest.approx(time.time(), abs=60)
    assert line == {"step": 1, "a": 0.5, "b": None, "c": None, "nonfinite": ["b", "c"]}
    log.close()
    assert not log.abandoned


def test_inactive_log_touches_nothing(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run", TrackingConfig(wandb="offline"), {}, None, active=False)
    log.log(1, {"a": 1.0})
    log.close()
    assert not log.abandoned
    assert not (tmp_path / "run").exists()


def test_resume_drops_later_and_truncated_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a": 3}\n{"step": 4, "a')
    log = MetricsLog(tmp_path, OFF, {}, 2, active=True)
    log.log(3, {"a": 30.0})
    log.close()
    assert [(line["step"], line["a"]) for line in read_lines(path)] == [(1, 1), (2, 2), (3, 30.0)]


def test_fresh_run_keeps_old_metrics(tmp_path: Path) -> None:
    for number in range(3):
        log = MetricsLog(tmp_path, OFF, {}, None, active=True)
        log.log(1, {"run": float(number)})
        log.close()
    found = {path.name: read_lines(path)[0]["run"] for path in tmp_path.glob("metrics*.jsonl")}
    assert found == {"metrics-1.jsonl": 0.0, "metrics-2.jsonl": 1.0, "metrics.jsonl": 2.0}


# ------------------------------------------------------------------------------------------------ wandb


class FakeWandb(types.ModuleType):
    """The part of wandb that is used; `finish` blocks until `release` is set."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.release = threading.Event()
        self.release.set()
        self.ids: list[str] = []
        self.logged: list[int] = []
        self.fail_at: int | None = None
        self.Settings = dict
        self.url = "url"
        self.dir = "wandb/run/files"

    def setup(self, settings: Any) -> None:
        pass

    def init(self, **arguments: Any) -> FakeWandb:
        self.ids.append(arguments["id"])
        return self

    def log(self, metrics: dict[str, float], step: int) -> None:
        if step == self.fail_at:
            raise RuntimeError(f"refused with key {os.environ['WANDB_API_KEY']}")
        self.release.wait()
        self.logged.append(step)

    def finish(self) -> None:
        self.release.wait()


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "secret" * 7)
    return fake


def test_resumed_run_keeps_its_wandb_id(tmp_path: Path, fake_wandb: FakeWandb) -> None:
    for resume_step in (None, 1, None):
        MetricsLog(tmp_path, TrackingConfig(wandb="online"), {}, resume_step, active=True).close()
    first, resumed, fresh = fake_wandb.ids
    assert first == resumed != fresh


def test_hanging_tracker_is_left_behind(
    tmp_path: Path, fake_wandb: FakeWandb, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.metrics.sinks._QUEUE_SIZE", 4)
    fake_wandb.release.clear()
    log = MetricsLog(tmp_path, TrackingConfig(wandb="online", timeout=0.2), {}, None, active=True)
    start = time.monotonic()
    for step in range(100):
        log.log(step, {"a": 1.0})
    log.close()
    assert time.monotonic() - start < 5
    assert log.abandoned
    assert "did not reach the tracker" in caplog.text
    assert "wandb sync" in caplog.text
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 100
    fake_wandb.release.set()


def test_failing_tracker_is_reported_once_without_secrets(tmp_path: Path, fake_wandb: FakeWandb, caplog: pytest.LogCaptureFixture) -> None:
    fake_wandb.fail_at = 1
    log = MetricsLog(tmp_path, TrackingConfig(wandb="online"), {}, None, active=True)
    for step in range(4):
        log.log(step, {"a": 1.0})
    log.close()
    assert not log.abandoned
    assert fake_wandb.logged == [0]
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 4
    (record,) = caplog.records
    assert "refused with key ***" in record.getMessage()


def test_missing_wandb_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    log = MetricsLog(tmp_path, TrackingConfig(wandb="online"), {}, None, active=True)
    log.log(1, {"a": 1.0})
    log.close()
    assert "not installed" in caplog.text
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1


PROGRAM = """
import logging, sys
from pathlib import Path
from rlhf.config import TrackingConfig
from rlhf.metrics import MetricsLog
logging.basicConfig(level=logging.INFO)
log = MetricsLog(Path(sys.argv[1]), TrackingConfig(wandb=sys.argv[2], timeout=8), {"seed": 0}, None, active=True)
for step in range(3):
    log.log(step, {"a": float(step)})
log.close()
sys.exit(9 if log.abandoned else 0)
"""


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A server that takes connections and never answers, as behind some firewalls."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(("mode", "silent"), [("online", False), ("offline", False), pytest.param("online", True, marks=pytest.mark.slow)])
def test_real_wandb_without_a_server(tmp_path: Path, mode: str, silent: bool, silent_port: int) -> None:
    """Ends by itself, with exit code 0, its data ready for `wandb sync`."""
    key = "0123456789" * 4
    environment = {**os.environ, "WANDB_BASE_URL": f"http://127.0.0.1:{silent_port if silent else 9}", "WANDB_API_KEY": key, "PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), mode]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 18  # the timeout of 8 s, the imports, and room for a busy machine; an exit hook of wandb takes 20 s
    assert key not in done.stdout + done.stderr
    assert ("no session with the server" in done.stderr) == (mode == "online")
    assert "wandb sync" in done.stderr
    (data,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert data.stat().st_size > 0
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 3


# ------------------------------------------------------------------------------------------------ console


def test_plain_console_prints_a_line_per_step() -> None:
    stream = io.StringIO()
    console = Console("auto", 10, active=True, stream=stream)  # not a terminal
    console.phase("gen")
    console.step(0, {"val-core/gsm8k/acc/high": 0.6, "val-core/gsm8k/acc/low": 0.4, "val-core/gsm8k/acc/mean@1": 0.5})
    console.step(1, {"critic/score/mean": 0.25})
    console.step(2, {"critic/score/mean": 0.75})
    console.message("saved [x]")
    console.close()
    zeroth, first, second, third = stream.getvalue().splitlines()
    assert zeroth == "step 0/10  val 0.5  left -"  # the mean, not a bound; validation says nothing of the pace
    assert first.startswith("step 1/10  val 0.5  reward 0.25  left 0:00:0")
    assert second.startswith("step 2/10  val 0.5  reward 0.75  left 0:00:0")
    assert third == "saved [x]"


def test_lost_samples_are_on_the_line() -> None:
    stream = io.StringIO()
    console = Console("auto", 10, active=True, stream=stream)
    for step, lost in enumerate((0.0, 48.0, 0.0)):
        console.step(step + 1, {"critic/score/mean": 0.25, "reward/invalid": lost})
    console.close()
    first, second, third = stream.getvalue().splitlines()
    assert "lost" not in first and "  lost 48  " in second and "  lost 0  " in third


def test_live_console_keeps_log_lines_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    logger = logging.getLogger("test_live_console")
    handler = logging.StreamHandler(out)
    logger.addHandler(handler)
    console = Console("live", 10, active=True)
    try:
        console.phase("update_actor")
        console.step(3, {"critic/score/mean": 0.25})
        assert handler.stream is not out  # goes through the live view
        logger.warning("a line of the log")
        console.message("saved [x]")
    finally:
        console.close()
        logger.removeHandler(handler)
    assert handler.stream is out
    assert sys.stdout is out
    text = out.getvalue()
    assert "a line of the log\n" in text
    assert "saved [x]\n" in text
    assert "update_actor" in text
    assert "3/10" in text


def test_inactive_console_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console("live", 10, active=False)
    console.phase("gen")
    console.step(1, {})
    console.message("x")
    console.close()
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------------ timing


def test_phase_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("rlhf.metrics.timing.time.perf_counter", lambda: clock[0])
    heard: list[str] = []

    def synchronize() -> None:
        clock[0] += 0.5  # kernels that still run when the host arrives

    timer = PhaseTimer(synchronize, heard.append)
    for _ in range(2):
        with timer.phase("gen", flops=100.0):
            clock[0] += 1.0
    timer.add("gen", tokens=60)
    with timer.phase("reward"):
        clock[0] += 2.0
    metrics = timer.metrics(200.0, step_tokens=130, actor_memory_mb=5.0)
    assert heard == ["gen", "gen", "reward"]
    # What was still running before a phase is not booked on it, what it started is: 2 x (1 + 0.5) and 2 + 0.5; the step has all of it.
    expected = {
        "timing_s/gen": 3.0,
        "timing_s/reward": 2.5,
        "timing_s/step": 7.0,
        "tokens/gen": 60,
        "model_flops/gen": 200,
        "perf/mfu/gen": 200 / 3 / 200,
        "perf/throughput": 130 / 7,
        "rollout/throughput_tokens_per_sec": 20.0,
        "reward/latency_ms": 2500.0,
        "train/step_time_ms": 7000.0,
        "memory/actor_gpu_mem_mb": 5.0,
    }
    assert metrics == pytest.approx(expected)
    assert "perf/mfu/gen" not in timer.metrics(None)
    timer.start_step()
    assert timer.metrics(200.0) == {"timing_s/step": 0.0, "train/step_time_ms": 0.0}


# ------------------------------------------------------------------------------------------------ model operations

LLAMA = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4, vocab_size=32)


def test_model_shape() -> None:
    shape = model_shape(LLAMA)
    # per layer: q and o 8 x 8 each, k and v 8 x 4 each, three matrices of 8 x 16
    assert (shape.layers, shape.q_dim, shape.block_params, shape.head_params) == (2, 8, 2 * (64 + 64 + 32 + 32 + 3 * 128), 256)
    assert model_shape(LLAMA, head_outputs=1).head_params == 8
    # GPT-2 names everything otherwise, has no grouped heads and two feed-forward matrices of 4 x hidden.
    assert model_shape(GPT2Config(n_embd=8, n_layer=2, n_head=2)).block_params == 2 * (4 * 64 + 2 * 8 * 32)


@pytest.mark.parametrize("family", [*sorted(set(FAMILIES_AND_OTHERS) - {"mixtral"}), "nanochat", "persimmon", "jais2"])
def test_model_operations_count_the_matrices_that_there_are(family: str) -> None:
    """Gated feed-forward blocks have three, others two: one too many says an MFU that is not reached."""
    sizes = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 8}
    config = copy.deepcopy(FAMILIES_AND_OTHERS[family]) if family in FAMILIES_AND_OTHERS else CONFIG_MAPPING[family](**sizes)
    foreign = {"gpt2": ("intermediate_size", "ffn_dim", "num_key_value_heads"), "gpt_neox": ("num_key_value_heads",), "opt": ("num_key_value_heads",)}
    for name in foreign.get(family, ()):  # sizes that the tests give to all, and this one has not
        delattr(config, name)
    with torch.device("meta"):
        layers = decoder_layers(AutoModelForCausalLM.from_config(config))
    assert model_shape(config).block_params == sum(p.numel() for p in layers.parameters() if p.dim() > 1)


def test_forward_update_and_rollout_flops() -> None:
    shape = model_shape(LLAMA)
    lengths = np.array([3, 5])
    forward = 2 * 1152 * 8 + 2 * 256 * 4 + 4 * 2 * 8 * (9 / 2 + 25 / 2)
    assert forward_flops(shape, lengths, 4) == forward
    assert update_flops(shape, lengths, 4) == 3 * forward
    assert update_flops(shape, lengths, 4, lora=True) == 2 * forward
    # Two samples of one prompt of 2 tokens: the second sample does not pay for the prompt again.
    once = 2 * 1152 * 2 + 4 * 2 * 8 * (4 / 2)
    assert rollout_flops(shape, np.array([7, 7]), np.array([2, 2]), np.array([1, 3])) == forward - once
    assert rollout_flops(shape, np.array([7, 8]), np.array([2, 2]), np.array([1, 3])) == forward


def test_peak_flops() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("cpu") is None


# ------------------------------------------------------------------------------------------------ intervals, samples


def test_bootstrap_interval() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    mean, low, high = bootstrap_interval(values, seed=1)
    assert mean == pytest.approx(values.mean())
    # Close to the normal interval; 15 %: noise of 2,000 resamples in the tails.
    half = 1.96 * values.std() / 20
    assert [mean - low, high - mean] == pytest.approx([half, half], rel=0.15)
    assert bootstrap_interval(values, seed=1) == (mean, low, high)
    assert bootstrap_interval(values, seed=2) != (mean, low, high)
    with pytest.raises(ValueError, match="non-empty"):
        bootstrap_interval([], seed=0)


def test_difference_interval_is_paired() -> None:
    before = np.random.default_rng(0).normal(0.0, 100.0, 50)
    mean, low, high = difference_interval(before, before + 1.0, seed=0)  # the spread of the items cancels
    assert (mean, low, high) == pytest.approx((1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="same items"):
        difference_interval([1.0], [1.0, 2.0], seed=0)


def test_wilson_interval() -> None:
    assert wilson_interval(8, 10) == pytest.approx((0.8, 0.4901625, 0.9433178), abs=1e-6)  # Wilson 1927, by hand with z = 1.959964
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.0, 0.2775328), abs=1e-6)
    with pytest.raises(ValueError, match="n > 0"):
        wilson_interval(0, 0)


def test_write_samples_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "samples" / "step-1.jsonl"
    write_samples(path, [{"prompt": "é"}])

    def broken() -> Any:
        yield {"prompt": "new"}
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_samples(path, broken())
    assert read_lines(path) == [{"prompt": "é"}]


def test_memory_that_runs_out_in_a_validation_is_of_what_was_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward model's forward has other keys to make it smaller than the rollout that it judges."""
    from rlhf.budget import smaller

    def judge(rollout: Any) -> Any:
        assert timer.latest == "reward"
        raise torch.OutOfMemoryError("CUDA out of memory")

    timer, nothing = PhaseTimer(), MagicMock()
    config = parse_config({"task": "rl", "run_dir": "x", "actor": {"path": "x"}, "reward": {"components": [{"function": "exact_match"}]},
                           "data": {"train": {"path": "x"}}, "train": {"steps": 1, "micro_batch_tokens": 8192}})  # fmt: skip
    for name in ("share_out", "gather_rollout"):
        monkeypatch.setattr(validation, name, nothing)
    rewards = MagicMock(score_with_models=judge)
    validate = validation.Validator(config, [], nothing, rewards, nothing, nothing, nothing, Path("x"), part=timer.part)
    with pytest.raises(torch.OutOfMemoryError), timer.phase("testing"):
        validate(1)
    assert smaller(config, timer.latest, 512) == ("train.micro_batch_tokens", 6400)
    with timer.phase("testing"), timer.part("reward"):
        pass
    assert timer.latest == "testing"
