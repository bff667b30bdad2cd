"""A rank that stops or hangs is named and ends the job, well before a collective's timeout.

Two threads on every rank, which need nothing of the main thread. `_exchange` tells the others where this rank is and reads where they are, on the
store that rank 0 serves. `_watch` judges what was read; it never waits for the store, which does not answer when rank 0 has stopped.

A rank is silent when its threads have not been heard of for DEAD_SECONDS: stopped, frozen, killed, or its interpreter held. It stalls when it is
heard of, makes no progress (`beat`, collectives, phases) and the others wait for it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, Protocol

EXIT_STALLED = 76  # a rank was silent or stalled (EX_PROTOCOL of sysexits.h: the other side does not answer as it must)
POLL_SECONDS = 1.0  # between two exchanges
DEAD_SECONDS = 60.0  # a rank that is not heard of for so long is silent; always less than a stall
LEAVE_SECONDS = 3.0  # from a verdict to the end of the process: all ranks write their stacks and leave together
PATIENCE = 2  # times the longest wait for progress in a phase that turned out well
HOST_WORK = ("set-up", "save_checkpoint")  # CPU seconds are progress there; elsewhere the main thread may spin, waiting for the device


class Store(Protocol):
    def set(self, key: str, value: str, /) -> Any: ...
    def multi_get(self, keys: Any, /) -> list[bytes]: ...


class Place(NamedTuple):
    """Where a rank is, as it tells the others."""

    step: int = 0
    phase: str = "set-up"
    entered: int = 0  # phases begun so far, the same ones on every rank
    collectives: int = 0  # begun so far, the same ones on every rank
    waits: bool = False  # for all others, on the store
    beats: int = 0
    cpu: int = 0  # tenths of a second of the main thread, in HOST_WORK
    left: bool = False  # done, and about to exit
    round: int = 0  # of its threads

    @property
    def order(self) -> tuple[int, int, bool]:
        """Ranks with less than others are those that the others wait for."""
        return self.entered, self.collectives, self.waits

    @property
    def progress(self) -> Place:
        return self._replace(round=0)


@dataclass(frozen=True)
class Sight:
    """What this rank knows of a rank, in seconds of its own monotonic clock."""

    place: Place
    heard: float  # when it was last heard of
    moved: float  # when it last made progress


class Verdict(NamedTuple):
    ranks: list[int]
    silent: bool
    seconds: float


def judge(
    sights: Mapping[int, Sight], me: int, answered: float, now: float, dead: float, budget: Callable[[str], float] | None = None
) -> Verdict | None:
    """Which ranks keep the job from going on. answered: when the store last did. budget: seconds without progress that a phase may have; None:
    nobody looks at progress."""
    if me != 0 and now - answered > dead:
        return Verdict([0], True, now - answered)
    there = {r: s for r, s in sights.items() if not s.place.left}
    silent = [r for r, s in there.items() if r != me and answered - s.heard > dead]
    if silent:
        return Verdict(silent, True, max(answered - there[r].heard for r in silent))
    behind = waited_for(there)
    if budget is None or not behind or any(now - there[r].moved <= budget(there[r].place.phase) for r in behind):
        return None
    return Verdict(behind, False, min(now - there[r].moved for r in behind))


def waited_for(sights: Mapping[int, Sight]) -> list[int]:
    """The ranks that are furthest behind."""
    least = min((s.place.order for s in sights.values() if not s.place.left), default=None)
    return [r for r, s in sights.items() if not s.place.left and s.place.order == least]


class Process(NamedTuple):
    """A rank's process, as another one on its node can find it."""

    host: str
    namespace: str  # of process ids
    pid: int
    started: str  # clock ticks since the boot: another process of the same number started later
    stacks: int  # file descriptor of its stacks on SIGUSR2
    place: int  # file descriptor of its `Place`

    @classmethod
    def own(cls, stacks: int, place: int) -> Process:
        pid = os.getpid()
        return cls(socket.gethostname(), os.readlink("/proc/self/ns/pid"), pid, _started(pid), stacks, place)

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}"

    def beside(self, other: Process) -> bool:
        return (self.host, self.namespace) == (other.host, other.namespace)

    def open(self, descriptor: int) -> IO[bytes]:
        """A file that it has in memory; OSError where it is gone or another user's."""
        return open(f"/proc/{self.pid}/fd/{descriptor}", "rb")

    @property
    def alive(self) -> bool:
        return self.started != "" and _started(self.pid) == self.started

    def describe(self) -> str:
        """What the system says of it, without its help."""
        folder = Path(f"/proc/{self.pid}")
        lines = [f"{self} does not answer; what the system says of it:"]
        for name in ("status", "wchan", "stack"):
            try:
                text = (folder / name).read_text().strip()
            except OSError as error:
                text = f"({error.strerror})"
            kept = [line for line in text.splitlines() if name != "status" or line.startswith(("State", "VmRSS", "Threads"))]
            lines += [f"{name}: {line}" for line in kept]
        return "\n".join(lines) + "\n"


def _started(pid: int) -> str:
    """Start time of a process; "" if there is none, or only its exit code."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


@contextlib.contextmanager
def in_time(seconds: float | None, rank: int, what: str) -> Iterator[None]:
    """End this process if the block takes longer: before ranks know each other nobody can say who is missing."""

    def give_up() -> None:
        os.write(2, f"error (rank {rank}): {what} after {seconds:.0f} s; the job ends with exit code {EXIT_STALLED}\n".encode())
        faulthandler.dump_traceback(2, all_threads=True)
        os._exit(EXIT_STALLED)

    timer = threading.Timer(seconds or 0.0, give_up)
    timer.daemon = True
    if seconds:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Watchdog:
    """`beat`, `enter` and `waiting` note where this rank is and are always there; somebody looks from `start` on."""

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.beats = 0
        self._place = Place()  # written by the main thread only
        self._round = 0
        self._store: Store | None = None
        self._collectives: Callable[[], int] = lambda: 0
        self._lock = threading.Lock()  # of what is published: an older place never follows a newer one
        self._closed = threading.Event()
        self._ending = threading.Lock()  # taken for good by who ends this process, be it a verdict or `close`
        self._threads: list[threading.Thread] = []

    def beat(self) -> None:
        """This rank makes progress."""
        self.beats += 1

    def enter(self, phase: str, step: int) -> None:
        """A phase begins, on all ranks. Told at once: who stops the next moment has stopped here."""
        self._place = self._place._replace(phase=phase, step=step, entered=self._place.entered + 1)
        self._publish()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, this rank waits for all others."""
        self._place = self._place._replace(waits=True)
        self._publish()
        try:
            yield
        finally:
            self._place = self._place._replace(waits=False)

    # ----------------------------------------------------------------------------------------------------------------------

    def start(
        self,
        store: Store | None,
        processes: Callable[[Process], Sequence[Process]],
        collectives: Callable[[], int],
        folder: Path | None,
        stall: float | None,
    ) -> None:
        """Watch from now on. processes: this rank's -> those of all ranks (collective). collectives: how many this rank has begun. folder: where
        stacks are written, in `stalls/`; None: to stderr. stall: seconds without progress; None: only whether the ranks are there."""
        self._store, self._collectives, self._folder, self._stall = store, collectives, folder, stall
        self._dead = min(DEAD_SECONDS, 0.75 * (stall or DEAD_SECONDS))
        self._interval = min(POLL_SECONDS, self._dead / 20)
        self._longest: dict[str, float] = {}
        self._ended: dict[str, Any] | None = None
        self._main_clock = time.pthread_getcpuclockid(threading.main_thread().ident or 0)
        # The handler of SIGUSR2 writes stacks without the interpreter, so also of a process whose threads do not run. Another rank reads them.
        self._stacks = os.memfd_create("stacks")
        fcntl.fcntl(self._stacks, fcntl.F_SETFL, os.O_APPEND)
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        self._shown = os.memfd_create("place")
        self._publish()
        if store is not None and self.rank == 0:
            store.set("ended", "")
        self._processes = processes(Process.own(self._stacks, self._shown))  # (collective): from here on every rank's key is in the store
        now = time.monotonic()
        self._keys = [f"rank/{r}" for r in range(len(self._processes))]
        self._sights = {r: Sight(Place(), now, now) for r in range(len(self._processes))}
        self._answered = self._awake = now
        self._threads = [threading.Thread(target=t, name=f"watchdog{t.__name__}", daemon=True) for t in (self._exchange, self._watch)]
        for thread in self._threads:
            thread.start()
        atexit.register(self._stop)

    def close(self) -> None:
        """This rank is done; its silence means nothing from here on. Rank 0, which serves the store, waits until all are."""
        if not self._threads:
            return
        self._ending.acquire()  # never given back; where a verdict has it, the process ends here
        self._place = self._place._replace(left=True)
        with contextlib.suppress(RuntimeError):  # rank 0 may be gone
            self._publish()
            end = time.monotonic() + 10
            while self._store is not None and self.rank == 0 and time.monotonic() < end:
                if all(place.left for place in self._read(self._store)):
                    break
                time.sleep(0.01)
        self._stop()

    def end_all(self, code: int) -> None:
        """Every other rank leaves with this exit code, wherever it waits: nothing else would wake it in a collective that this rank will never join.
        Returns when they have had the time to."""
        if self._store is not None:
            self._closed.set()
            self._store.set("ended", json.dumps({"code": code}))
            time.sleep(3 * POLL_SECONDS)

    def _stop(self) -> None:
        """End the threads before the interpreter does, which would abort one that comes back from the store then."""
        self._closed.set()
        for thread in self._threads:
            thread.join(2 * LEAVE_SECONDS)
        atexit.unregister(self._stop)

    # ----------------------------------------------------------------------------------------------------------------------
    # Telling and reading

    def _publish(self) -> None:
        if self._store is not None:
            with self._lock:
                place = json.dumps(self._here())
                os.pwrite(self._shown, f"{place}\n".encode(), 0)  # for who is on this node and finds no store
                self._store.set(f"rank/{self.rank}", place)

    def _here(self) -> Place:
        place = self._place
        cpu = int(10 * time.clock_gettime(self._main_clock)) if place.phase in HOST_WORK else 0
        return place._replace(beats=self.beats, collectives=self._collectives(), cpu=cpu, round=self._round)

    def _read(self, store: Store) -> list[Place]:
        return [Place(*json.loads(value)) for value in store.multi_get(self._keys)]

    def _exchange(self) -> None:
        """(thread)"""
        while not self._closed.wait(self._interval):
            self._round += 1
            try:
                self._publish()
                if self._store is None:
                    places = [self._here()]
                else:
                    places = self._read(self._store)
                    ended = self._store.multi_get(["ended"])[0]
                    self._ended = json.loads(ended) if ended else None
            except RuntimeError:  # rank 0, which serves the store, is gone; `_watch` waits whether this process ends by itself
                return
            self._look(places)

    def _look(self, places: Sequence[Place]) -> None:
        """Note what has changed, and the longest times that ranks for which the others waited took to make progress."""
        now = self._wake()
        behind = waited_for(self._sights)
        for rank, place in enumerate(places):
            seen = self._sights[rank]
            moved = place.progress != seen.place.progress
            if moved and rank in behind:
                phase = seen.place.phase
                self._longest[phase] = max(self._longest.get(phase, 0.0), now - seen.moved)
            self._sights[rank] = Sight(place, now if place != seen.place else seen.heard, now if moved else seen.moved)
        self._answered = now

    def _wake(self) -> float:
        """The time. Whoever was stopped himself, alone or with all others (a suspended job), knows nothing of them: their clocks begin anew."""
        now = time.monotonic()
        if now - self._awake > self._dead / 2:
            self._answered = now
            self._sights = {r: replace(s, heard=now, moved=now) for r, s in self._sights.items()}
        self._awake = now
        return now

    # ----------------------------------------------------------------------------------------------------------------------
    # Judging and leaving

    def _budget(self, phase: str) -> float:
        assert self._stall is not None
        return max(self._stall, PATIENCE * self._longest.get(phase, 0.0))

    def _watch(self) -> None:
        """(thread)"""
        while not self._closed.wait(self._interval):
            now = self._wake()
            if os.fstat(self._stacks).st_size:  # another rank has asked for the stacks of this one, which did not answer
                self._exit(EXIT_STALLED)
            if self._ended:
                self._leave(**self._ended)
                return
            verdict = judge(self._sights, self.rank, self._answered, now, self._dead, self._budget if self._stall else None)
            if verdict:
                self._conclude(verdict)
                return

    def _conclude(self, verdict: Verdict) -> None:
        places = {r: self._whereabouts(r) for r in verdict.ranks}
        first = places[verdict.ranks[0]]
        stalls = f"step-{first.step}-{first.phase}"
        seconds = f"{verdict.seconds:.0f} s"
        if verdict.silent:
            found = "; ".join(
                f"rank {r} ({self._processes[r]}) has not answered for {seconds}, in phase {p.phase} of step {p.step}" for r, p in places.items()
            )
        else:
            who = ", ".join(f"rank {r} ({self._processes[r]})" for r in verdict.ranks)
            found = f"no progress for {seconds} in phase {first.phase} of step {first.step}: " + (
                f"all others wait for {who}" if len(places) < len(self._sights) else f"every rank is in the same place: {who}"
            )
        end = {"code": EXIT_STALLED, "found": found, "stalls": stalls, "silent": verdict.ranks if verdict.silent else []}
        if self._store is not None and 0 not in end["silent"]:  # type: ignore[operator]
            # In a thread of its own: it may never come back.
            threading.Thread(target=self._store.set, args=("ended", json.dumps(end)), daemon=True).start()
        self._leave(**end)  # type: ignore[arg-type]

    def _whereabouts(self, rank: int) -> Place:
        """Where a rank is. What the store said of rank 0 is as old as the last answer: if it is on another node it waits where this rank does, most
        likely."""
        heard, process = self._sights[rank].place, self._processes[rank]
        if process.beside(self._processes[self.rank]) and process.alive:
            with contextlib.suppress(OSError, ValueError), process.open(process.place) as shown:
                return Place(*json.loads(shown.readline()))
        return max(heard, self._place, key=lambda p: p.entered) if rank == 0 else heard

    def _leave(self, code: int, found: str = "", stalls: str = "", silent: Sequence[int] = ()) -> None:
        """End this process, unless it is at its regular end. found: what has happened; without it another rank has said enough."""
        if not self._ending.acquire(blocking=False):
            return
        if not found:
            self._exit(code)
        end = time.monotonic() + min(LEAVE_SECONDS, self._dead / 4)
        folder = self._folder / "stalls" / stalls if self._folder else None
        where = f"stacks of all ranks: {folder}" if folder else "stacks follow"
        self._say(f"error (rank {self.rank}): {found}. The job ends with exit code {code}; {where}\n")
        # In a thread of its own: a file system that hangs may be what it is all about.
        threading.Thread(target=self._write, args=(folder, self.rank, None), daemon=True).start()
        quiet = {*silent, *(r for r, s in self._sights.items() if r != self.rank and self._answered - s.heard > 4 * self._interval)}
        for rank in sorted(quiet):
            self._end_process(rank, quiet, folder, end)
        time.sleep(max(0.0, end - time.monotonic()))
        self._exit(code)

    def _end_process(self, rank: int, quiet: Collection[int], folder: Path | None, end: float) -> None:
        """The stacks of a rank that cannot write them, and its end: the first rank of its node that can sees to it."""
        process = self._processes[rank]
        near = (r for r, p in enumerate(self._processes) if p.beside(process) and r not in quiet and not self._sights[r].place.left)
        if self._sights[rank].place.left or next(near, None) != self.rank:
            return
        text = process.describe().encode() if process.alive else f"{process} is gone\n".encode()
        if process.alive:
            with contextlib.suppress(OSError), process.open(process.stacks) as stacks:
                # First, and to the main thread: it writes the stacks as it goes on, before it does anything else.
                ctypes.CDLL(None).tgkill(process.pid, process.pid, signal.SIGUSR2)
                os.kill(process.pid, signal.SIGCONT)
                while process.alive and time.monotonic() < end - 0.2:  # it leaves by itself, with our exit code, if its threads run
                    time.sleep(0.02)
                text += stacks.read()
            with contextlib.suppress(OSError):
                if process.alive:
                    os.kill(process.pid, signal.SIGKILL)
        writer = threading.Thread(target=self._write, args=(folder, rank, text), daemon=True)
        writer.start()
        writer.join(1.0)

    def _write(self, folder: Path | None, rank: int, text: bytes | None) -> None:
        """`text`, or the stacks of this process, into the rank's file."""
        head = f"rank {rank}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        try:
            if folder is None:
                raise OSError
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(folder / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError:
            file = 2
        os.write(file, head.encode() + (text or b""))
        if text is None:
            faulthandler.dump_traceback(file, all_threads=True)

    @staticmethod
    def _say(text: str) -> None:
        os.write(2, text.encode())  # not through sys.stderr, which the main thread may hold

    @staticmethod
    def _exit(code: int) -> NoReturn:
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)
        flush.start()
        flush.join(0.5)  # who reads our output may be what has stopped
        os._exit(code)
