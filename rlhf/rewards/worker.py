"""The processes that score: a guard and its scorer, one pair for each worker of `pool.Pool`. Imports no torch: a pair starts in a tenth of a second.

The guard runs no code of users. It forks the scorer, hands it calls, and replaces it when a sample takes too long, kills it, or makes it flood the
machine with processes; only that sample is lost. What a scorer has started ends with it: its process group is killed at once, and what has left the
group is adopted by the guard (a subreaper) and killed after it. A guard ends with its trainer, a scorer with its guard.

A call's arguments lie as a pickle in memory that trainer, guard and scorer share; all that travels back is JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import math
import os
import pickle
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from numbers import Real
from typing import Any, NoReturn

from rlhf.rewards.functions import RewardFunction, resolve_function

IMPORT_SECONDS = 300.0  # until the modules of all functions are imported
LOOK_SECONDS = 0.02  # between looks whether the scorer floods the machine, and whether the trainer is there
PROCESSES = 256  # that a scorer may have started
HOPELESS = 10  # timeouts' worth of time without a score: the rest of the call is not tried
TIMEOUT = "timeout"
FLOAT32 = 3.4028234663852886e38  # what rewards are kept in

Result = float | str  # a score, or the reason why there is none


class Unusable(Exception):
    """A reward that is no finite number; the message is the reason it is counted under."""

    def __init__(self, reason: str, note: str = "") -> None:
        super().__init__(reason)
        self.note = note  # traceback


# --------------------------------------------------------------------------------------------------------------------------
# The scorer


def judge(function: RewardFunction, inputs: dict[str, list[Any]], arguments: dict[str, Any], count: int, done: int, together: bool) -> Iterator[Any]:
    """Results of samples `done` to `count`: {"all"}, of one call with all, or after {"again": why not} {"one"} for each, called alone."""

    def call(rows: range) -> list[Any]:
        # Lists of its own for each call: a function that empties its input must not spoil the next call.
        try:
            results: Any = function(**{name: [values[row] for row in rows] for name, values in inputs.items()}, **arguments)
            if hasattr(results, "tolist"):  # arrays and tensors
                results = results.tolist()
        except BaseException as error:
            raise Unusable(f"raised {type(error).__name__}", _theirs(traceback.format_exception(error))) from None
        if not isinstance(results, list | tuple):
            raise Unusable(f"returned {type(results).__name__} instead of a list")
        if len(results) != len(rows):
            raise Unusable("wrong length")
        return list(results)

    if together:
        try:
            yield {"all": [_checked(value) for value in call(range(count))]}
            return
        except Unusable as reason:
            if count == 1:
                yield {"one": str(reason), "note": reason.note}
                return
            yield {"again": str(reason), "note": reason.note}
    for row in range(done, count):
        try:
            yield {"one": _checked(call(range(row, row + 1))[0]), "note": ""}
        except Unusable as reason:
            yield {"one": str(reason), "note": reason.note}


def _theirs(lines: list[str]) -> str:
    """A traceback without this module's frames."""
    return "".join(line for line in lines if __file__ not in line)


def _checked(value: Any) -> Result:
    try:
        return number(value)
    except Unusable as reason:
        return str(reason)


def number(value: Any) -> float:
    """A finite float (bools count), or Unusable."""
    if value is None:
        raise Unusable("None")
    if not isinstance(value, Real) and callable(getattr(value, "item", None)):  # numpy and torch scalars
        try:
            value = value.item()
        except Exception:
            raise Unusable("not a number") from None
    if not isinstance(value, Real):
        raise Unusable("not a number")
    try:
        found = float(value)
    except Exception as error:  # of a class of the user's
        raise Unusable("infinite" if isinstance(error, OverflowError) else "not a number") from None
    if math.isnan(found):
        raise Unusable("NaN")
    if math.isinf(found):
        raise Unusable("infinite")
    if abs(found) > FLOAT32:
        raise Unusable("beyond float32")
    return found


def _serve(names: list[str], requests: int, replies: int, payload: int) -> None:
    """Import the functions, then answer calls, a line of JSON each."""
    own = os.getpid()

    def say(line: Any) -> None:
        if os.getpid() != own:  # a function has forked, and this is the child coming back
            os._exit(0)
        data = json.dumps(line).encode() + b"\n"
        while data:
            data = data[os.write(replies, data) :]

    functions = {name: resolve_function(name) for name in names}
    say({"ready": own})
    with open(requests, "rb") as lines:
        for line in lines:
            name, length, count, done, together = json.loads(line)
            try:
                inputs, arguments = pickle.loads(os.pread(payload, length, 0))
            except BaseException as error:
                inputs, arguments = {}, {}
                say({"again": "", "note": ""})
                for _ in range(done, count):
                    say({"one": f"raised {type(error).__name__}", "note": traceback.format_exc()})
                continue
            for result in judge(functions[name], inputs, arguments, count, done, together):
                say(result)


# --------------------------------------------------------------------------------------------------------------------------
# The guard


class Lost(Exception):
    """The scorer gives no result; the message is the reason that its sample is counted under."""


class Guard:
    """Has one scorer at a time. timeout: seconds for a sample alone, and as many for a call with several."""

    def __init__(self, names: list[str], payload: int, timeout: float, trainer: int) -> None:
        self.names, self.payload, self.timeout, self.trainer = names, payload, timeout, trainer
        self.vain = dict.fromkeys(names, 0.0)  # seconds since a function's last score that timeouts and deaths have cost
        self.pid = 0

    def run(self) -> None:
        """Answer the trainer's calls (standard input and output) until it goes."""
        self.start()
        pending = b""
        while True:
            self.wait(1.0, 0)
            if not (data := os.read(0, 1 << 16)):
                return
            pending += data
            while b"\n" in pending:
                line, pending = pending.split(b"\n", 1)
                answer = json.dumps(self.score(*json.loads(line))).encode() + b"\n"
                while answer:
                    answer = answer[os.write(1, answer) :]

    def score(self, name: str, length: int, count: int) -> dict[str, Any]:
        """{"results": one for each sample, "notes": reason -> traceback, "again": why a call with all did not do and its traceback, or None}"""
        results: list[Result] = []
        notes: dict[str, str] = {}
        again: tuple[str, str] | None = None
        limit = HOPELESS * self.timeout
        together = self.vain[name] < limit
        self.vain[name] = min(self.vain[name], limit - self.timeout)  # given up before: a sample decides whether to go on
        while len(results) < count:
            if self.vain[name] >= limit:
                results += ["not tried"] * (count - len(results))
                break
            began, lost, imported = time.monotonic(), "", False
            try:
                self.ready()
                imported = True
                self.ask(name, length, count, len(results), together)
                while len(results) < count:
                    began = time.monotonic()
                    answer = self.answer(self.timeout)
                    if "all" in answer:
                        results = answer["all"]
                    elif "again" in answer:
                        together, again = False, (answer["again"], answer["note"])
                        continue
                    else:
                        results.append(answer["one"])
                        if isinstance(answer["one"], str):
                            notes[answer["one"]] = answer["note"]
                    self.vain[name] = 0.0
            except Lost as reason:
                lost = str(reason)
            if not lost:
                break
            note = self.replace(ask=lost == TIMEOUT)
            self.vain[name] += time.monotonic() - began
            if not imported:
                notes[f"{lost} on import"] = note
                results += [f"{lost} on import"] * (count - len(results))
            elif together and (count > 1 or lost != TIMEOUT):  # a single sample that dies has a second chance too
                together, again = False, (lost, note)
            else:
                results.append(lost)
                notes[lost] = note
        return {"results": results, "notes": notes, "again": again}

    # ---- the scorer's life

    def start(self) -> None:
        requests, self.requests = os.pipe()
        self.replies, replies = os.pipe()
        self.faults = os.memfd_create("faults")
        self.pending, self.is_ready = b"", False
        guard = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
                if os.getppid() != guard:
                    os._exit(1)
                os.close(self.requests)
                os.close(self.replies)
                self._be_scorer(requests, replies)
            finally:
                os._exit(1)
        os.close(requests)
        os.close(replies)

    def _be_scorer(self, requests: int, replies: int) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)  # what functions print
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # out of memory: this one, not the trainer
        faulthandler.enable(self.faults)
        try:
            _serve(self.names, requests, replies, self.payload)
        except BaseException:
            traceback.print_exc()

    def ready(self) -> None:
        """Wait until the functions are imported. Raises Lost."""
        if self.status():  # died while nobody asked anything of it
            self.replace()
        if not self.is_ready:
            self.answer(IMPORT_SECONDS)
            self.is_ready = True

    def ask(self, *call: Any) -> None:
        try:
            os.write(self.requests, json.dumps(call).encode() + b"\n")
        except BrokenPipeError:
            raise Lost(self.cause()) from None

    def answer(self, seconds: float) -> dict[str, Any]:
        """The scorer's next line. Raises Lost."""
        deadline, entities = time.monotonic() + seconds, _entities()
        while b"\n" not in self.pending:
            if self.replies in self.wait(min(LOOK_SECONDS, max(0.0, deadline - time.monotonic())), self.replies, 0):
                data = os.read(self.replies, 1 << 20)
                self.pending += data
                if not data:
                    raise Lost(self.cause())
                continue
            if self.status():  # its children may hold the pipe open
                if not select.select([self.replies], [], [], 0)[0]:
                    raise Lost(self.cause())
            elif time.monotonic() > deadline:
                raise Lost(TIMEOUT)
            elif _entities() > entities + PROCESSES // 2:
                if len(_descendants()) > PROCESSES:
                    raise Lost(f"more than {PROCESSES} processes")
                entities = _entities()
        line, self.pending = self.pending.split(b"\n", 1)
        try:
            found: dict[str, Any] = json.loads(line)
        except ValueError:
            raise Lost("wrote into the pipe") from None
        return found

    def status(self) -> Any:
        """How the scorer ended, None if it has not; it stays unburied, so that nobody else gets its process id."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)

    def cause(self) -> str:
        """What a scorer whose pipe is closed died of."""
        end = time.monotonic() + 1
        while time.monotonic() < end:
            if status := self.status():
                if status.si_code == os.CLD_EXITED:
                    return f"died (exit {status.si_status})"
                return f"died ({signal.Signals(status.si_status).name})"
            time.sleep(0.001)
        return "closed its pipe"

    def replace(self, ask: bool = False) -> str:
        """End the scorer and all that it has started, and have another. Where it stood (ask: if it still runs), or what it died of."""
        if ask:  # faulthandler writes down where it stands, inside of C code too
            os.kill(self.pid, signal.SIGABRT)
            end = time.monotonic() + 0.5
            while time.monotonic() < end and not self.status():
                time.sleep(0.005)
        note = _theirs(os.pread(self.faults, 1 << 14, 0).decode(errors="replace").splitlines(keepends=True))
        self.end()
        self.start()
        return note

    def end(self) -> None:
        """Kill the scorer and everything that it has started, and wait until nothing is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        deadline = time.monotonic() + 20  # what hangs in the kernel hangs
        with contextlib.suppress(ChildProcessError):
            while time.monotonic() < deadline:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    for pid in _descendants():
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    time.sleep(0.001)
        for descriptor in (self.requests, self.replies, self.faults):
            os.close(descriptor)

    def wait(self, seconds: float, *descriptors: int) -> list[int]:
        """Those of the descriptors that can be read. Ends this process if the trainer is gone; `seconds` is how often it looks."""
        while True:
            readable = select.select(descriptors, [], [], seconds)[0]
            if os.getppid() != self.trainer or (0 in readable and len(descriptors) > 1):  # in the middle of a call the trainer says nothing
                sys.exit()
            if readable or len(descriptors) > 1:
                return readable
            self._reap()

    def _reap(self) -> None:
        """Bury adopted processes that have ended by themselves."""
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and found.si_pid != self.pid:
                os.waitpid(found.si_pid, 0)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def _entities() -> int:
    """Threads on this machine: cheap to look at, while counting one's own processes takes a look at every one there is."""
    with open("/proc/loadavg") as file:
        return int(file.read().split()[3].split("/")[1])


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                stat = file.read()
                children.setdefault(int(stat[stat.rindex(b")") + 2 :].split()[1]), []).append(int(name))
    found = list(children.get(os.getpid(), []))
    for pid in found:
        found += children.get(pid, [])
    return found


def main() -> NoReturn:
    """Arguments: the trainer's process id, the descriptor of the shared memory, `timeout`, the functions' names as JSON; the trainer's sys.path."""
    trainer, payload, timeout, names = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), json.loads(sys.argv[4])
    os.set_inheritable(payload, False)
    _prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    guard = Guard(names, payload, timeout, trainer)
    try:
        guard.run()
    finally:
        if guard.pid:
            guard.end()
    sys.exit()
