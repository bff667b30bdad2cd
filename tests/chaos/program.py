"""`train_rlhf.py` in which one rank does as the variable MISCHIEF says: {"rank", "what", "phase", "step"}.

stop: SIGSTOP in the middle of the phase. hang: its main thread sleeps there for good. slow: every forward and decoding step takes SLOW seconds more.
rate: from this step on it learns at another rate. weights: one weight changes. recipe: it has read another number of steps.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import rlhf.config
import rlhf.models.loading
from rlhf.engine import FrozenEngine, TrainEngine
from rlhf.rollout import HybridEngine
from rlhf.rollout.loop import DecodeLoop
from rlhf.watchdog import Watchdog

SLOW = 0.1
ROOT = Path(__file__).resolve().parents[2]
mischief = json.loads(os.environ["MISCHIEF"])
here: tuple[str, int] = ("set-up", 0)


def act(engine: Any) -> None:
    what = mischief["what"]
    if what == "slow":
        time.sleep(SLOW)
    elif here[1] >= mischief.get("step", 0) and here[0] == mischief.get("phase", here[0]):
        Path(os.environ["STOPPED"]).touch()
        if what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif what == "hang":
            time.sleep(3600)
        elif what == "rate":
            engine.config = engine.config.model_copy(update={"learning_rate": 0.5})
        elif what == "weights":
            with torch.no_grad():
                next(engine.module.parameters()).view(-1)[0] += 1e-3
        mischief["what"] = "done" if what in ("stop", "weights") else what


def first(holder: Any, name: str) -> None:
    """Mischief before each call of a function."""
    whole: Callable[..., Any] = getattr(holder, name)

    def changed(*arguments: Any, **named: Any) -> Any:
        act(arguments[0])
        return whole(*arguments, **named)

    setattr(holder, name, changed)


def enter(self: Watchdog, phase: str, step: int) -> None:
    global here
    whole_enter(self, phase, step)
    here = (phase, step)


if int(os.environ["RANK"]) == mischief["rank"]:
    whole_enter, Watchdog.enter = Watchdog.enter, enter  # type: ignore[method-assign]
    if mischief["what"] == "recipe":
        sys.argv.append("train.steps=9")
    elif mischief["what"] == "slow":
        first(DecodeLoop, "step")
        first(TrainEngine, "__call__")
    elif mischief["what"] in ("rate", "weights"):
        first(TrainEngine, "step")
    else:
        first(rlhf.models.loading, "_fill")
        first(HybridEngine, "generate")
        first(FrozenEngine, "__call__")
        for name in ("score", "backward", "state_files"):
            first(TrainEngine, name)

sys.argv[0] = str(ROOT / "train_rlhf.py")
runpy.run_path(sys.argv[0], run_name="__main__")
