"""What came out of the quick start, as tables; the same numbers go to report.json in the run folder.

python scripts/quickstart_report.py runs/quickstart
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from report import accuracy, percent, phase_seconds, points, read_metrics
from rich.console import Console
from rich.table import Table

STAGES = {"sft": "warm start", "reward_model": "reward model", "ppo": "PPO"}


def collect(run: Path) -> dict[str, Any]:
    """All numbers of the tables, from what the run wrote."""
    steps = {stage: read_metrics(run / stage) for stage in STAGES}
    found = accuracy(run / "ppo", steps["ppo"])
    first, last = (next(line for line in steps["ppo"] if line["step"] == step) for step in found["steps"])
    pairs = next(line for line in reversed(steps["reward_model"]) if "val-core/pair_accuracy/mean" in line)
    return {
        "seed": int((run / "seed").read_text()),
        **found,
        "reward_model_before": first["val-aux/reward/reward_model"],
        "reward_model_after": last["val-aux/reward/reward_model"],
        "verifier_before": first["val-aux/reward/verifier"],
        "verifier_after": last["val-aux/reward/verifier"],
        "kl_per_response": steps["ppo"][-1]["actor/kl_per_response"],
        "pair_accuracy": [pairs[f"val-core/pair_accuracy/{k}"] for k in ("mean", "low", "high")],
        "pairs": int(pairs["val-core/pair_accuracy/n"]),
        "stage_seconds": {name: int((run / "seconds" / name).read_text()) for name in ("data", "sft", "pairs", "reward_model", "ppo")},
        "phase_seconds": {stage: phase_seconds(lines) for stage, lines in steps.items()},
    }


def results(r: dict[str, Any]) -> Table:
    table = Table("", "before PPO", "after PPO", "difference", title=f"Spelling backward, seed {r['seed']}, after {r['steps'][1]} PPO steps")
    table.add_row(
        f"accuracy, greedy, {r['problems']} held-out words [95 %]",
        percent(r["accuracy_before"]),
        percent(r["accuracy_after"]),
        points(r["difference"]),
    )
    for label, name in (("reward by the reward model, in deviations", "reward_model"), ("reward by the verifier (PPO never sees it)", "verifier")):
        before, after = r[f"{name}_before"], r[f"{name}_after"]
        table.add_row(label, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
    table.add_row("KL to the reference per response, in nats", "0", f"{r['kl_per_response']:.2f}", "")
    table.add_row(f"reward model, {r['pairs']} held-out pairs ranked rightly [95 %]", percent(r["pair_accuracy"]), "", "")
    return table


def seconds(r: dict[str, Any]) -> Table:
    stages = r["stage_seconds"]
    table = Table("stage", "seconds", "of which", title=f"Seconds: {sum(stages.values())} in all")
    for stage, total in stages.items():
        phases = Counter({name: value for name, value in r["phase_seconds"].get(stage, {}).items() if name != "step"})
        named = [f"{name} {value:.1f}" for name, value in phases.most_common()]
        other = [f"starting and the rest {max(0.0, total - phases.total()):.1f}"] if named else []
        table.add_row(STAGES.get(stage, stage), str(total), ", ".join(named + other))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables of a finished quick start.")
    parser.add_argument("run", type=Path, help="its run folder")
    run: Path = parser.parse_args().run
    report = collect(run)
    (run / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(results(report), seconds(report))
    console.print(
        f"Everything is in {run}: samples to read in {run}/ppo/samples, the trained model in {run}/ppo/checkpoints/latest/hf.", soft_wrap=True
    )


if __name__ == "__main__":
    main()
