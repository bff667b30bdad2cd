"""What a person watches: a live view on a terminal, one line per step in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from datetime import timedelta
from typing import IO, Literal

import rich.console
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

# Label -> metrics that may carry it, the first one present counts; a name that ends in "/" stands for all below it.
_SHOWN = {
    "loss": ("train/loss", "actor/pg_loss"),
    "reward": ("critic/score/mean", "critic/rewards/mean"),
    "lost": ("reward/invalid",),  # samples without a score: from the first on
    "kl": ("actor/kl", "actor/kl_loss", "actor/ppo_kl"),
    "val": ("val-core/",),
    "unjudged": ("val-aux/verifier/failed",),  # held-out samples that the verifier failed on: from the first on
    "tok/s": ("perf/throughput", "rollout/throughput_tokens_per_sec"),
}
_WINDOW = 20  # steps that the time left is estimated from


class Console:
    """Progress of a run on `stream` (default: stdout). On inactive ranks every call does nothing.

    While the live view is up, prints and log lines of this process appear above it.
    """

    def __init__(self, mode: Literal["auto", "live", "plain"], total_steps: int, active: bool, stream: IO[str] | None = None) -> None:
        self._active = active
        self._total = total_steps
        self._step = 0
        self._phase = "start"
        self._shown: dict[str, float] = {}
        self._ends: deque[float] = deque(maxlen=_WINDOW + 1)  # of steps, after the start of the first one
        self._moved: list[tuple[logging.StreamHandler[IO[str]], IO[str]]] = []
        self._live: Live | None = None
        if not active:
            return
        self._console = rich.console.Console(file=stream, force_terminal=True if mode == "live" else None, highlight=False)
        if mode == "live" or (mode == "auto" and self._console.is_terminal and not self._console.is_dumb_terminal):
            self._start_live()

    def phase(self, name: str) -> None:
        """A phase of a step begins."""
        self._phase = name
        if not self._ends:  # loading models is over
            self._ends.append(time.monotonic())

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """A step has ended. What a step does not report (validation, mostly) keeps its last value."""
        if not self._active:
            return
        self._step = step
        if step == 0:  # a validation before training says nothing of the pace
            self._ends.clear()
        self._ends.append(time.monotonic())
        ordered = sorted(metrics, key=lambda k: ("/mean" not in k, k))  # a mean before the bounds of its interval
        for label, names in _SHOWN.items():
            key = next((k for name in names for k in ordered if k == name or (name.endswith("/") and k.startswith(name))), None)
            if key is not None and (label not in ("lost", "unjudged") or metrics[key] or label in self._shown):
                self._shown[label] = metrics[key]
        if self._live is None:
            values = "".join(f"  {label} {value:.4g}" for label, value in self._shown.items())
            print(f"step {step}/{self._total}{values}  left {self._left()}", file=self._console.file, flush=True)

    def message(self, text: str) -> None:
        """A line that stays."""
        if not self._active:
            return
        if self._live is None:
            print(text, file=self._console.file, flush=True)
        else:
            self._console.print(text, markup=False)

    def close(self) -> None:
        """Take the live view down and give the log handlers their streams back."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            for handler, stream in self._moved:
                handler.setStream(stream)
            self._moved.clear()

    def _start_live(self) -> None:
        streams = {id(sys.stdout): "stdout", id(sys.stderr): "stderr"}
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
        self._live.start()
        # Live puts itself behind sys.stdout and sys.stderr, but handlers made before hold the bare streams and would tear the view.
        for logger in [logging.getLogger(), *logging.root.manager.loggerDict.values()]:
            for handler in getattr(logger, "handlers", ()):
                name = streams.get(id(getattr(handler, "stream", None)))
                if name is not None:
                    self._moved.append((handler, handler.stream))
                    handler.setStream(getattr(sys, name))

    def _left(self) -> str:
        """Time for the remaining steps at the pace of the last ones."""
        steps = len(self._ends) - 1
        if steps < 1:
            return "-"
        return str(timedelta(seconds=round((self._ends[-1] - self._ends[0]) / steps * (self._total - self._step))))

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        table.add_row(*(Text(label, style="dim") for label in ("phase", "step", "left", *self._shown)))
        table.add_row(self._phase, f"{self._step}/{self._total}", self._left(), *(f"{value:.4g}" for value in self._shown.values()))
        return Group(table, ProgressBar(total=self._total, completed=self._step, width=60))
