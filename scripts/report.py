"""Before and after of an rl run, as a table: `python scripts/report.py RUN_DIR`."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf.metrics import bootstrap_interval, difference_interval

Interval = tuple[float, float, float]  # estimate, low, high


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def percent(interval: Interval) -> str:
    mean, low, high = (100 * value for value in interval)
    return f"{mean:.1f} % [{low:.1f}, {high:.1f}]"


def points(interval: Interval) -> str:
    mean, low, high = (100 * value for value in interval)
    return f"{mean:+.1f} points [{low:+.1f}, {high:+.1f}]"


def correct_at(run: Path, step: int) -> np.ndarray:
    """[n]: 1 for held-out problems that were solved at a validation, 0 for others, NaN where the verifier has failed."""
    correct: np.ndarray = np.load(run / "samples" / f"validation-{step:06d}-correct.npy").astype(float)
    return correct


def accuracy(run: Path, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """First and last validation with 95 % bootstrap intervals, and the paired difference."""
    steps = [line["step"] for line in lines if any(key.startswith("val-core/") for key in line)]
    if len(steps) < 2:
        raise SystemExit(f"{run}: fewer than two validations in metrics.jsonl; there is nothing to compare")
    before, after = correct_at(run, steps[0]), correct_at(run, steps[-1])
    judged = np.isfinite(before) & np.isfinite(after)
    if not judged.any():
        raise SystemExit(f"{run}: the verifier has failed on every held-out problem of step {steps[0]} or {steps[-1]}")
    unjudged, before, after = int((~judged).sum()), before[judged], after[judged]
    return {
        "problems": len(before),
        "unjudged": unjudged,
        "steps": (steps[0], steps[-1]),
        "accuracy_before": bootstrap_interval(before, seed=0),
        "accuracy_after": bootstrap_interval(after, seed=0),
        "difference": difference_interval(before, after, seed=0),
    }


def phase_seconds(lines: list[dict[str, Any]]) -> Counter[str]:
    """Seconds of each phase over the run."""
    total: Counter[str] = Counter()
    for line in lines:
        total.update({key.removeprefix("timing_s/"): value for key, value in line.items() if key.startswith("timing_s/")})
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder of an rl run")
    run: Path = parser.parse_args().run
    if not (run / "metrics.jsonl").is_file():
        parser.error(f"{run}: no metrics.jsonl in it: not a run folder (of scripts/quickstart.sh it is ppo/ inside)")
    lines = read_metrics(run)
    found, seconds = accuracy(run, lines), phase_seconds(lines)
    table = Table("", f"step {found['steps'][0]}", f"step {found['steps'][1]}", "difference", title=str(run))
    label = f"accuracy on {found['problems']} held-out problems [95 %]"
    if found["unjudged"]:
        table.caption = f"{found['unjudged']} more on which the verifier has failed are left out"
    table.add_row(label, percent(found["accuracy_before"]), percent(found["accuracy_after"]), points(found["difference"]))
    phases = Table("phase", "seconds", "tokens of a rank", "MFU of the last step", title=f"Seconds: {seconds['step']:.0f} in all steps")
    for name, value in seconds.most_common():
        if name != "step":
            tokens = sum(line.get(f"tokens/{name}", 0) for line in lines)
            mfu = lines[-1].get(f"perf/mfu/{name}")
            phases.add_row(name, f"{value:.1f}", f"{tokens:.0f}" if tokens else "", f"{100 * mfu:.2f} %" if mfu else "")
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table, phases)
    console.print(f"Samples to read: {run}/samples; the trained model: {run}/checkpoints/latest/hf", soft_wrap=True)


if __name__ == "__main__":
    main()
