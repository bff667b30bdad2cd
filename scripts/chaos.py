"""Kills jobs at random, and looks whether the supervisor brings each to the end of the run that nobody touched.

    python scripts/chaos.py --kills 100 [--seed 0] [--first 0] [--jobs 1] [--ranks 2] [--algorithm ppo] [--shape 0.5B] [--out folder] [key=value ...]

A job is PPO or GRPO on two ranks (of GPUs, if there are any, else CPU), in deterministic mode, under `scripts/supervise.sh deepspeed`. Each gets one
SIGKILL: at a rank or at a process of the launcher; some time into a phase of a step, or at an operation of a checkpoint on a file (writing,
syncing, renaming, deleting). It is right if in the end its weights, optimizer states and samples have the SHA-256 of the undisturbed run, and no
process is left. key=value changes the recipe of the killed ones only: what must not make a difference (checkpoint.background=true). JSON, a line for
each kill, then one for all. Exit code 1 if one is not right.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.workloads import SHAPES
from tests.chaos.ground import Job, digest, make_ground, undisturbed

STEPS = 3
PHASES = {
    "ppo": ("gen", "reward", "ref", "values", "old_log_prob", "update_actor", "update_critic", "hand_over", "testing", "save_checkpoint"),
    "grpo": ("gen", "reward", "ref", "update_actor", "hand_over", "testing", "save_checkpoint"),
}
GRPO = {"algorithm": {"name": "grpo", "kl": {"coef": 0.01}}, "rollout": {"prompts": 4, "group_size": 4, "max_new_tokens": 6}, "critic": None}
FILE_OPERATIONS = {0: 75, 1: 15}  # rank -> about so many in a run


def plan(seed: int, ranks: int, algorithm: str) -> str:
    """The kill of this number, as the hook reads it."""
    random_ = random.Random(seed)
    rank = random_.randrange(ranks)
    who = random_.choices(["rank", "inner", "launcher"], [8, 1, 1])[0]
    if random_.random() < 0.5:
        return f"{rank} {who} {random_.choice(PHASES[algorithm])}-{random_.randint(1, STEPS)} {random_.choice([0, 0.01, 0.05, 0.2])}"
    return f"{rank} {who} file-{random_.randint(1, FILE_OPERATIONS[rank])} 0"


def disturbed(
    recipe: Path, run_dir: Path, kill: str, expected: Callable[[], str], ranks: int = 2, overrides: Sequence[str] = ()
) -> dict[str, object]:
    """One job."""
    started = time.monotonic()
    job = Job(recipe, run_dir, *overrides, kill=kill, ranks=ranks)
    found: dict[str, object] = {"kill": kill}
    try:
        code = job.wait(600)
        found |= {"exit": code, "same": code == 0 and digest(run_dir, STEPS) == expected()}
    except AssertionError as error:
        found |= {"same": False, "error": str(error)[-2000:]}
    hit = len(list(job.notes.glob("killed-*"))) == len(kill.split(";"))
    return found | {"hit": hit, "seconds": round(time.monotonic() - started, 1)}


def make_random(folder: Path, shape: str) -> None:
    """Weights of this shape in place of the ground's, which keeps its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(SHAPES[shape].config(), dtype=torch.bfloat16).save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="number of the first kill, to go on with an earlier series")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="at a time")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--algorithm", choices=PHASES, default="ppo")
    parser.add_argument("--shape", choices=SHAPES, help="of a random model; default: two layers of 64")
    parser.add_argument("--out", type=Path, help="a new folder; default: a temporary one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, for the killed jobs only")
    arguments = parser.parse_args()
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    recipe = make_ground(folder, STEPS, **(GRPO if arguments.algorithm == "grpo" else {}))
    if arguments.shape:
        make_random(folder / "base", arguments.shape)

    def one(number: int) -> dict[str, object]:
        kill = plan(1000 * arguments.seed + number, arguments.ranks, arguments.algorithm)
        found = disturbed(recipe, folder / f"run-{number}", kill, expected.result, arguments.ranks, arguments.overrides)
        print(json.dumps({"number": number, **found}), flush=True)
        return found

    with ThreadPoolExecutor(arguments.jobs) as jobs:
        expected = jobs.submit(undisturbed, recipe, folder / "undisturbed", STEPS, arguments.ranks)
        all_found = list(jobs.map(one, range(arguments.first, arguments.first + arguments.kills)))
    right, hit = (sum(bool(found[key]) for found in all_found) for key in ("same", "hit"))
    print(json.dumps({"kills": arguments.kills, "hit": hit, "same": right, "sha256": expected.result(), "folder": str(folder)}), flush=True)
    return 0 if right == hit == arguments.kills else 1


if __name__ == "__main__":
    sys.exit(main())
