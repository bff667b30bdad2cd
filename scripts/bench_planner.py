"""How full and how equal the planned forwards of an optimizer step are, on the lengths of the workloads. No model, no device.

    python scripts/bench_planner.py

A JSON line for each workload, budget of tokens and number of ranks:

- fill: tokens over forwards x the fullest forward: the smallest budget that gives as few forwards.
- fill_of_budget: tokens over forwards x the budget that was given. As forwards are few and equal, it says how near the tokens are to a multiple.
- imbalance: tokens of the fullest rank over the mean, each turn by itself, as ranks meet in every forward.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from rlhf.batching import plan_micro_batches
from scripts.workloads import step_lengths

BUDGETS = (8_192, 16_384, 32_768, 49_152)


def measures(lengths: Sequence[int], ranks: int, micro_batch: int = 1, tokens: int | None = None) -> dict[str, float]:
    plans = [plan_micro_batches(range(len(lengths)), lengths, micro_batch, ranks, rank, tokens) for rank in range(ranks)]
    real = [[[] if part.weightless else [lengths[row] for row in part.rows] for part in plan] for plan in plans]
    loads = np.array([[sum(part) for part in plan] for plan in real])
    padded = np.array([[len(part) * max(part, default=0) for part in plan] for plan in real])
    found = {
        "forwards": float(loads.shape[1]),
        "fill": loads.sum() / (loads.size * loads.max()),
        "imbalance": loads.max(0).sum() / loads.mean(0).sum(),
        "imbalance_padded": padded.max(0).sum() / padded.mean(0).sum(),
    }
    return found | ({"fill_of_budget": loads.sum() / (loads.size * tokens)} if tokens else {})


def main() -> None:
    for workload in "ABVT":
        _, _, before, responses = step_lengths(workload, 1.0)
        for tokens in BUDGETS:
            for ranks in (1, 2, 8):
                found = measures((responses + before).tolist(), ranks, tokens=tokens)
                case = {"bench": "planner", "case": f"{workload}, {tokens} tokens, {ranks} ranks", "rows": len(responses)}
                print(json.dumps(case | {name: round(float(value), 4) for name, value in found.items()}), flush=True)


if __name__ == "__main__":
    main()
