"""Metrics to `metrics.jsonl`, which always works, and to Weights & Biases, which may not: training never waits for it."""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import re
import threading
import time
import uuid
from pathlib import Path
from typing import IO, Any

from rlhf.config import TrackingConfig
from rlhf.secrets import scrub

logger = logging.getLogger(__name__)

_QUEUE_SIZE = 4096


class MetricsLog:
    """One line per call in `run_dir/metrics.jsonl`, and a copy to the tracker. On inactive ranks every call does nothing.

    resume_step: the step that training goes on from; later lines of the file are dropped, as those steps will come again. None starts
    a fresh file and keeps an existing one as `metrics-N.jsonl`.
    """

    def __init__(self, run_dir: Path, tracking: TrackingConfig, config_dict: dict[str, Any], resume_step: int | None, active: bool) -> None:
        self._file: IO[str] | None = None
        self._tracker: _WandbTracker | None = None
        self._last_step = -1
        if not active:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        if path.exists():
            if resume_step is None:
                _set_aside(path)
            else:
                self._last_step = _drop_after(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        if tracking.wandb != "off":
            self._tracker = _WandbTracker(run_dir, tracking, config_dict, resumed=resume_step is not None)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one JSON line, then hand a copy to the tracker. NaN and infinities become null, and `nonfinite` lists their keys."""
        if self._file is None:
            return
        finite = {key: float(value) if math.isfinite(value) else None for key, value in metrics.items()}
        line: dict[str, Any] = {"step": step, "time": time.time(), **finite}
        nonfinite = [key for key, value in finite.items() if value is None]
        if nonfinite:
            line["nonfinite"] = nonfinite
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._tracker:
            self._tracker.log(step, {key: float(value) for key, value in metrics.items()})

    def complete(self, step: int, metrics: dict[str, float]) -> None:
        """Log `step` if the file ends before it: its checkpoint was written, then the run was killed."""
        if self._last_step < step:
            self.log(step, metrics)

    def close(self) -> None:
        """Close the file and give the tracker `tracking.timeout` seconds to finish."""
        if self._file is not None:
            self._file.close()
            self._file = None
            if self._tracker:
                self._tracker.close()

    @property
    def abandoned(self) -> bool:
        """True when the tracker still hangs after `close()`.

        wandb's exit hook waits without limit for its service process, which waits for the server. A program that finds this True must
        flush its streams and leave with `os._exit(code)`; the data stays on disk for `wandb sync`.
        """
        return self._tracker is not None and self._tracker.abandoned


class _WandbTracker:
    """wandb in a daemon thread behind a bounded queue: whatever raises or hangs there is reported once and left behind."""

    def __init__(self, run_dir: Path, tracking: TrackingConfig, config_dict: dict[str, Any], resumed: bool) -> None:
        self._run_dir = run_dir.resolve()
        self._tracking = tracking
        self._config = config_dict
        self._id = _wandb_id(run_dir / "wandb_id", resumed)
        self._data = self._run_dir / "wandb"  # becomes the run's own folder once it has one
        self._dropped = 0
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(_QUEUE_SIZE)
        self._thread = threading.Thread(target=self._main, name="wandb-tracker", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._put((step, metrics))

    def close(self) -> None:
        self._put(None)
        self._thread.join(self._tracking.timeout)
        if self._dropped:
            logger.warning("wandb: %d lines did not reach the tracker; metrics.jsonl has all of them", self._dropped)
        if self.abandoned:
            logger.warning(
                "wandb: not finished after %g s, left behind. Its data is in %s; upload with `wandb sync %s`",
                self._tracking.timeout,
                self._data,
                self._data,
            )

    @property
    def abandoned(self) -> bool:
        return self._thread.is_alive()

    def _put(self, item: tuple[int, dict[str, float]] | None) -> None:
        while self._thread.is_alive():
            try:
                return self._queue.put_nowait(item)
            except queue.Full:
                try:
                    self._queue.get_nowait()
                    self._dropped += 1
                except queue.Empty:
                    continue  # the tracker emptied it meanwhile

    def _main(self) -> None:
        try:
            run = self._start()
            while (item := self._queue.get()) is not None:
                # wandb ignores steps below its last one: after a resume it keeps the first copy of a repeated step.
                run.log(item[1], step=item[0])
            run.finish()
        except ImportError:
            logger.warning("wandb: the package is not installed (`pip install wandb`); metrics.jsonl is written all the same")
        except Exception as error:
            logger.warning(
                "wandb: %s; no longer tracked, training goes on and metrics.jsonl has everything. Data until now: %s", _describe(error), self._data
            )

    def _start(self) -> Any:
        # Its telemetry goes to the same server, and an exit hook of its own would wait 20 s for it.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        wandb.setup(settings=wandb.Settings(silent=True))  # no output into the live view, and no prompt for a key
        if self._tracking.wandb == "offline":
            return self._init(wandb, "offline")
        try:
            run = self._init(wandb, "online")
        except Exception as error:
            logger.warning("wandb: no session with the server (%s); going on offline", _describe(error))
            wandb.teardown()  # or the failed session still holds the run id
            run = self._init(wandb, "offline")
        else:
            logger.info("wandb: %s", run.url)
        return run

    def _init(self, wandb: Any, mode: str) -> Any:
        # Half of the timeout each, so that start and finish together end inside what close() waits.
        half = self._tracking.timeout / 2
        # Of git the commit alone: the address of a remote may hold a token as its user, which wandb takes to be a name.
        settings = wandb.Settings(silent=True, console="off", init_timeout=half, finish_timeout=half, git_remote="")
        run = wandb.init(
            mode=mode,
            project=self._tracking.project,
            name=self._tracking.name or self._run_dir.name,
            dir=str(self._run_dir),
            id=self._id,
            resume="allow",
            config=self._config,
            settings=settings,
        )
        self._data = Path(run.dir).parent
        if mode == "offline":
            logger.info("wandb: offline data in %s; upload with `wandb sync %s`", self._data, self._data)
        return run


def _wandb_id(path: Path, resumed: bool) -> str:
    if resumed and path.exists() and re.fullmatch(r"[0-9a-f]{12}", found := path.read_text(encoding="utf-8", errors="replace").strip()):
        return found  # what is something else could lead out of the run folder
    identity = uuid.uuid4().hex[:12]
    path.write_text(identity + "\n", encoding="utf-8")
    return identity


def _describe(error: Exception) -> str:
    """One line for the log, without the key should a message ever quote it."""
    return f"{type(error).__name__}: {scrub((str(error).splitlines() or [''])[0])}"


def _set_aside(path: Path) -> None:
    number = 1
    while (old := path.with_name(f"metrics-{number}.jsonl")).exists():
        number += 1
    path.rename(old)
    logger.info("a fresh run in a used folder: the old metrics are kept in %s", old)


def _drop_after(path: Path, resume_step: int) -> int:
    """Rewrite the file without lines after `resume_step` and without a line that a kill cut short. Returns the last step that is left."""
    kept = []
    last = -1
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            step = json.loads(line)["step"]
            if step <= resume_step:
                kept.append(line + "\n")
                last = step
        except ValueError:
            logger.warning("%s: dropped a line that is not JSON: %.80s", path, line)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return last
