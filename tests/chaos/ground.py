"""What the tests that disturb real jobs share: a tiny recipe, a hook into its phases, the job under its supervisor, what must be true of its end."""

from __future__ import annotations

import contextlib
import hashlib
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from rlhf.checkpoint import Mark, damage
from tests.e2e.programs import ROOT, command, environment, make_model, reversal_rows, write_jsonl, write_recipe

HOOK = '''
"""A reward, and hooks into the ranks.

CHAOS_AT="PHASE-STEP": when that phase begins (start-0: before the ranks join), each rank leaves a file CHAOS_NOTES/RANK and waits a second.
CHAOS_KILL="RANK WHO EVENT SECONDS; ...": one kill for each attempt: at an event of that rank WHO gets SIGKILL so many seconds later. WHO is rank,
inner (the process that has started the ranks) or launcher (the one that has started that). EVENT is PHASE-N, in the N-th step of this attempt, or
file-N: the N-th operation of a checkpoint on a file.
"""

import os
import signal
import threading
import time
from pathlib import Path

import psutil

from rlhf import files
from rlhf.metrics.timing import PhaseTimer

rank, at, notes = os.environ.get("RANK"), os.environ.get("CHAOS_AT"), Path(os.environ["CHAOS_NOTES"])
begun, whole = {"gen": 0, "file": 0}, PhaseTimer.phase
kills = [kill.split() for kill in os.environ["CHAOS_KILL"].split(";") if kill]
number = len(list(notes.glob("killed-*")))
victim, who, event, seconds = kills[number] if number < len(kills) else ("none", "", "", "")


def kill():
    with (notes / f"killed-{number}").open("w") as file:
        os.fsync(file.fileno())
    parents = [p for p in psutil.Process().parents() if "deepspeed" in " ".join(p.cmdline()) and "supervise.sh" not in " ".join(p.cmdline())]
    {"rank": psutil.Process(), "inner": parents[0], "launcher": parents[-1]}[who].send_signal(signal.SIGKILL)
    time.sleep(3)  # the ranks are to find out before the run is over


def happens(name):
    if rank == victim and name == event and not (notes / f"killed-{number}").exists():
        if float(seconds):
            threading.Timer(float(seconds), kill).start()
        else:
            kill()


def arrive(here):
    if at == here:
        (notes / rank).write_text("here")
        time.sleep(1)
    happens(here)


def phase(self, name, *arguments, **keywords):
    begun["gen"] += name == "gen"
    arrive(f"{name}-{begun['gen']}")
    return whole(self, name, *arguments, **keywords)


def before(operation, path):
    begun["file"] += 1
    happens(f"file-{begun['file']}")


if rank is not None:
    PhaseTimer.phase, files.before = phase, before
    arrive("start-0")


def odd(completions, completion_ids, **columns):
    return [sum(i % 2 for i in ids) / 6 for ids in completion_ids]  # random models of any vocabulary have some
'''


def make_ground(folder: Path, steps: int = 4, **changes: Any) -> Path:
    """The recipe: PPO with a checkpoint after every step. changes: None takes a section away."""
    make_model(folder / "base")
    write_jsonl(folder / "rows.jsonl", reversal_rows(200))
    write_jsonl(folder / "held_out.jsonl", reversal_rows(40, seed=1))
    (folder / "python").mkdir()
    (folder / "python" / "chaos_hook.py").write_text(HOOK)
    recipe = {
        "task": "rl",
        "run_dir": folder / "run",
        "threads": 1,
        "deterministic": True,
        "actor": {"path": folder / "base", "learning_rate": 2e-3},
        "critic": {"init": "actor", "learning_rate": 2e-3},
        "data": {"train": {"path": folder / "rows.jsonl"}},
        "reward": {"components": [{"function": "chaos_hook:odd"}]},
        "rollout": {"prompts": 16, "group_size": 1, "max_new_tokens": 6},
        "algorithm": {"name": "ppo", "kl": {"coef": 0.01, "controller": "adaptive", "target": 1.0, "horizon": 1000}, "minibatches": 2},
        "validation": {"data": {"path": folder / "held_out.jsonl", "size": 8}, "verifier": "exact_match", "every": 1},
        "train": {"steps": steps, "micro_batch": 8},
        "checkpoint": {"every": 1, "keep_last": 2, "save_hf": False},
        **changes,
    }
    return write_recipe(folder / "recipe.yaml", {name: section for name, section in recipe.items() if section is not None})


class Job:
    """`scripts/supervise.sh deepspeed train_rlhf.py`. before: a command that runs it; env: further variables."""

    def __init__(
        self, recipe: Path, run_dir: Path, *arguments: str, at: str = "", kill: str = "", ranks: int = 2, before: Sequence[str] = (), **env: str
    ) -> None:
        self.run_dir, self.notes = run_dir, run_dir.with_name(f"{run_dir.name}-notes")
        self.notes.mkdir(exist_ok=True)
        self.log = run_dir.with_name(f"{run_dir.name}.log")
        mine = {"PYTHONPATH": str(recipe.parent / "python"), "CHAOS_NOTES": str(self.notes), "CHAOS_AT": at, "CHAOS_KILL": kill, "PAUSE": "0", **env}
        supervisor = ["bash", str(ROOT / "scripts" / "supervise.sh")]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*before, *supervisor, *command("deepspeed", ["--config", str(recipe), f"run_dir={run_dir}", *arguments], ranks)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment(**mine),
                cwd=recipe.parent,
            )
        self.seen: dict[int, psutil.Process] = {}

    def family(self) -> dict[int, psutil.Process]:
        """All processes that the job has, or has had when this was called before."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.seen |= {p.pid: p for p in psutil.Process(self.process.pid).children(recursive=True)}
        return self.seen

    def ranks(self) -> list[psutil.Process]:
        """Those that live, by rank."""
        found = {}
        for process in self.family().values():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if (rank := re.search(r"train_rlhf.py --local_rank=(\d)", line)) and "launch" not in line:
                    found[int(rank[1])] = process
        return [found[rank] for rank in sorted(found)]

    def wait_for_phase(self, seconds: float = 200) -> None:
        """Until all ranks have begun the phase `at`."""
        end = time.monotonic() + seconds
        while len(list(self.notes.iterdir())) < 2:
            assert self.process.poll() is None and time.monotonic() < end, f"it never came:\n{self.log.read_text()[-5000:]}"
            time.sleep(0.01)
        self.family()

    def wait(self, seconds: float = 300) -> int:
        """The exit code; nothing that it started may be left."""
        end = time.monotonic() + seconds
        try:
            while self.process.poll() is None:
                assert time.monotonic() < end, f"still running after {seconds} s:\n{self.log.read_text()[-5000:]}"
                self.family()
                time.sleep(0.2)
            _, left = psutil.wait_procs(list(self.family().values()), 10)
            assert not left, f"orphans: {[(p.pid, p.cmdline()) for p in left]}"
        finally:
            self.kill()
        return int(self.process.returncode)

    def kill(self) -> None:
        for process in [*self.family().values()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def newest(run_dir: Path) -> Path:
    """The newest checkpoint, which is whole."""
    folders = {mark: p for p in (run_dir / "checkpoints").iterdir() if not p.is_symlink() and (mark := Mark.of(p))}
    found = folders[max(folders)]
    assert damage(found) is None
    assert (run_dir / "checkpoints" / "latest").resolve() == found.resolve()
    return found


def digest(run_dir: Path, step: int) -> str:
    """SHA-256 of all that the ranks keep of the models after a step, and of every step's samples."""
    whole = hashlib.sha256()
    files = sorted((run_dir / "checkpoints" / f"checkpoint-{step}").glob("*/rank-*-*.safetensors"))
    assert files, run_dir
    for file in [*files, *sorted((run_dir / "samples").glob("training-*.jsonl"))]:
        whole.update(file.read_bytes())
    return whole.hexdigest()


def undisturbed(recipe: Path, run_dir: Path, steps: int, ranks: int = 2) -> str:
    """The digest of the run that nobody touches."""
    job = Job(recipe, run_dir, ranks=ranks)
    assert job.wait() == 0, job.log.read_text()[-5000:]
    return digest(run_dir, steps)
