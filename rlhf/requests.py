"""What a running job may be asked from outside: to save, or to save and leave. Asked of any rank, done by all at their next common boundary.

    SIGTERM, SIGUSR1, SIGINT (Ctrl-C; twice: at once) to any rank; RUN_DIR/stop, $RLHF_CONTROL/stop; a limit of time; a launcher that is gone:
        save and leave with exit code 75
    RUN_DIR/save; SIGRTMIN to any rank: save, and go on

Handlers only take note: DeepSpeed's launcher signals its ranks one after another, each once the one before has ended, so that a handler that saves
together with the others would wait for them for ever.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from pathlib import Path
from types import TracebackType

import psutil

SAVE, STOP = 1, 2

CONTROL = "RLHF_CONTROL"  # a folder through which scripts/supervise.sh talks to rank 0
STARTED = "RLHF_STARTED"
OWNER = ".slurm-job"  # in the run folder
LAUNCHERS = ("deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run", "accelerate", "supervise.sh")
GONE = "the launcher is gone"
POLL_SECONDS = 1.0
SLOW_DISK = 0.3e9  # bytes a second
SPAWN_SECONDS = 30.0  # in which a launcher starts all its ranks


class Requests:
    """Asked of this rank. A context: signals are handled inside of it, from before the ranks have joined to the end. max_time: seconds from
    `started`. The rank that its launcher has named 0 looks at files and clocks."""

    def __init__(self, run_dir: Path | None = None, max_time: float | None = None) -> None:
        is_main = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0
        control = os.environ.get(CONTROL)
        self._control = Path(control) if control and is_main else None
        self._files = {run_dir / "save": SAVE, run_dir / "stop": STOP} if run_dir and is_main else {}
        self._run_dir = run_dir
        self._saving = self._stopping = self._interrupted = False
        self.reason: str | None = None
        self._limit = max_time if is_main else None
        self._polled: float | None = None
        self._longest_part = self._longest_save = self._expected_save = 0.0  # seconds
        self._before: dict[int, object] = {}
        self._over = threading.Event()
        self.leaving = False  # together with all ranks: everything is saved

    def __enter__(self) -> Requests:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGRTMIN, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:  # as a shell has SIGINT ignored in what it puts into the background
                self._before[number] = signal.signal(number, self._handle)
        if self._control and self._run_dir:
            (self._control / "run_dir").write_text(str(self._run_dir.resolve()))
        self._heard, write = os.pipe()
        os.set_blocking(write, False)
        self._before_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, args=(launchers(),), daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        os.close(signal.set_wakeup_fd(self._before_fd))
        self._watcher.join()
        os.close(self._heard)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self._ask(SAVE if number == signal.SIGRTMIN else STOP, signal.Signals(number).name)

    def _ask(self, what: int, reason: str) -> None:
        """From a handler or another thread at any moment: nothing that is asked for may be lost, so that nothing is read and then written here."""
        if what == SAVE:
            self._saving = True
        elif not self._stopping:
            self.reason, self._stopping = reason, True

    def _watch(self, above: list[psutil.Process]) -> None:
        beside: set[psutil.Process] = set()
        began = time.monotonic()
        ended = False  # by a launcher, perhaps; Python's own handlers wait for the main thread, which may wait for a lost rank
        while not self._over.is_set():
            if above and time.monotonic() - began < SPAWN_SECONDS:
                with contextlib.suppress(psutil.Error):
                    beside |= {*above[0].children()}
            if select.select([self._heard], [], [], POLL_SECONDS)[0]:
                ended |= signal.SIGTERM in os.read(self._heard, 64)
            if any(_is_gone(process) for process in above):
                self._ask(STOP, GONE)
            # A launcher that has lost a rank sends SIGTERM to the others, one after another, and SIGKILL to each that is still there after 30 s:
            # those that wait for the lost one in a collective.
            if ended and not self.leaving and any(_is_gone(process) for process in beside):
                os._exit(128 + signal.SIGTERM)

    def poll(self) -> int:
        """SAVE, STOP or 0; SAVE only once."""
        for file, what in self._files.items():
            if file.exists() and file.stat().st_mtime >= started():  # older ones were asked of an earlier run, or of another that is still there
                reason = f"the file {file}"
                if what == STOP and self._control:  # should this attempt end before it has left: it was asked of the job
                    (self._control / "stop").write_text(f"{reason}\n")
                file.unlink(missing_ok=True)
                self._ask(what, reason)
        if self._control and (self._control / "stop").exists():
            self._ask(STOP, (self._control / "stop").read_text().strip() or "the supervisor")
        now = time.monotonic()
        if self._polled is not None:
            self._longest_part = max(self._longest_part, now - self._polled)
        self._polled = now
        if (
            self._limit is not None
            and time.time() - started() + 1.2 * self._longest_part + 2 * (self._longest_save or self._expected_save) > self._limit
        ):
            self._ask(STOP, f"--max_time {self._limit:g} s is near")
        if self._stopping:
            return STOP
        saving, self._saving = self._saving, False
        return SAVE if saving else 0

    def expect_save(self, size: int) -> None:
        """Of so many bytes, all ranks' together: room that `max_time` leaves until it is known how long one takes."""
        self._expected_save = size / SLOW_DISK

    def saved(self, seconds: float) -> None:
        """A checkpoint took so long; it is no part of a step."""
        self._longest_save = max(self._longest_save, seconds)
        self._polled = time.monotonic()

    def done(self) -> None:
        """Tell the supervisor that the run is complete: DeepSpeed's launcher says so too when it was killed."""
        if self._control:
            (self._control / "done").touch()

    def leave(self, reason: str) -> None:
        """Tell the supervisor that this end was asked for: it does not start the job again."""
        if self._control and reason != GONE:
            (self._control / "left").write_text(reason)


def started() -> float:
    """When the job was started, in seconds since the epoch: by the supervisor, if there is one, which may have started several attempts since."""
    return float(os.environ.get(STARTED) or psutil.Process().create_time())


def resumes(resume: str, run_dir: Path) -> str:
    """What `--resume` means for a job that is started again with the same command line: never, or an old checkpoint, until the run folder is its own
    (`own`), or it has a checkpoint of its own."""
    control = os.environ.get(CONTROL)
    if control and Path(control, "saved").exists():
        return "auto"
    job, owner = os.environ.get("SLURM_JOB_ID"), run_dir / OWNER
    if job and int(os.environ.get("SLURM_RESTART_COUNT") or 0) and owner.exists() and owner.read_text() == job:
        return "auto"
    return resume


def own(run_dir: Path) -> None:
    """From here on every checkpoint in this folder belongs to the history that this job goes on with, also when Slurm starts it again."""
    if job := os.environ.get("SLURM_JOB_ID"):
        (run_dir / OWNER).write_text(job)


def tell(code: int) -> None:
    """The supervisor what this job ends with: launchers other than DeepSpeed's end with 1, whatever their ranks end with."""
    if control := os.environ.get(CONTROL):
        own = Path(control, f"code-{os.getpid()}")
        with contextlib.suppress(OSError):
            own.write_text(str(code))
            os.replace(own, Path(control, "code"))


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def launchers() -> list[psutil.Process]:
    """The processes above this one that started it, up to the first that is no launcher."""
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            if not any(Path(word).name in LAUNCHERS for word in process.cmdline()[:4]):
                break
            found.append(process)
    return found
