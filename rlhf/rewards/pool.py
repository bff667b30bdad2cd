"""Worker processes for reward functions, as the trainer sees them; `worker.py` is what runs in them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import queue
import select
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import psutil

from rlhf.rewards.functions import FunctionReward
from rlhf.rewards.worker import HOPELESS, IMPORT_SECONDS

logger = logging.getLogger(__name__)

LOST_SECONDS = 10.0  # beside its timeout a sample may cost so much, with a new scorer after it

# A fresh interpreter with this one's sys.path, hash seed and environment; never a fork of a process that has CUDA.
_START = "import sys; sys.path[:] = sys.argv[5:]; from rlhf.rewards.worker import main; main()"


class Worker:
    """One guard with its scorer."""

    def __init__(self, functions: list[str], timeout: float) -> None:
        self.functions, self.timeout = functions, timeout
        self.payload, self.closed = os.memfd_create("scorer"), False
        self.start()

    def start(self) -> None:
        arguments = [str(os.getpid()), str(self.payload), str(self.timeout), json.dumps(self.functions), *sys.path]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, *arguments],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self.payload],
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.requests, self.replies = self.process.stdin, self.process.stdout

    def call(self, function: str, data: bytes, count: int) -> dict[str, Any]:
        """As `worker.Guard.score`. A guard that was killed is replaced, and asked once more."""
        os.ftruncate(self.payload, 0)
        written = 0
        while written < len(data):
            written += os.pwrite(self.payload, memoryview(data)[written:], written)
        for _ in range(2):
            with contextlib.suppress(BrokenPipeError):
                self.requests.write(json.dumps([function, len(data), count]).encode() + b"\n")
                if (line := self._line(count)).endswith(b"\n"):
                    found: dict[str, Any] = json.loads(line)
                    return found
            if self.closed:
                break
            self.end()
            self.start()
        return {"results": ["guard died"] * count, "notes": {}, "again": None}

    def _line(self, count: int) -> bytes:
        """The guard's answer; empty if it has ended. One that was stopped, or takes longer than any `count` samples may, is killed."""
        looks, stopped, line = 0, 0, b""
        ready = select.poll()  # where select() ends at descriptor 1,023
        ready.register(self.replies, select.POLLIN)
        while looks < (count + HOPELESS + 1) * (self.timeout + LOST_SECONDS) + 2 * IMPORT_SECONDS and stopped <= self.timeout:
            if ready.poll(1000):
                with contextlib.suppress(ValueError):  # the pool has closed it meanwhile
                    piece = b""
                    piece = os.read(self.replies.fileno(), 1 << 16)
                line += piece
                if not piece or line.endswith(b"\n"):
                    return line
            else:
                looks, stopped = looks + 1, stopped + 1 if _is_stopped(self.process.pid) else 0
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its scorer goes with it
        return b""

    def end(self) -> None:
        self.requests.close()
        try:
            self.process.wait(30)  # it ends its scorer and all that this has started
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.replies.close()

    def close(self) -> None:
        self.closed = True
        self.end()
        os.close(self.payload)


def _is_stopped(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


class Pool:
    """`workers` processes that score by any of these functions, each started with all of them imported."""

    def __init__(self, functions: Iterable[str], workers: int = 1, timeout: float = 30.0) -> None:
        names = sorted(set(functions))
        self.timeout = timeout
        self.pace = 0.0  # seconds that a sample took in the last call
        self.workers = [Worker(names, timeout) for _ in range(workers if names else 0)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self._idle.put(worker)
        self._logged: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all workers, busy or not."""
        for worker in self.workers:
            worker.close()

    def score(
        self, function: FunctionReward, prompts: list[str], completions: list[str], completion_ids: list[list[int]], columns: dict[str, list[Any]]
    ) -> tuple[list[float | None], Counter[str]]:
        """([B] reward, or None where the sample is lost; reason -> number of lost samples). Waits for an idle worker; any thread may call."""
        inputs = function.inputs({**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids})
        results = self._results(function, inputs, len(completions))
        failures = Counter(result for result in results if isinstance(result, str))
        return [None if isinstance(result, str) else float(result) for result in results], failures

    def _results(self, function: FunctionReward, inputs: dict[str, list[Any]], count: int) -> list[float | str]:
        if not count:
            return []
        try:
            data = pickle.dumps((inputs, function.arguments), protocol=5)
        except Exception as error:
            if count == 1:
                self._log(function, "not picklable", f"{type(error).__name__}: {error}")
                return ["not picklable"]
            alone = [{name: [values[row]] for name, values in inputs.items()} for row in range(count)]
            return [result for row in alone for result in self._results(function, row, 1)]
        worker = self._idle.get()
        try:
            found = worker.call(function.path, data, count)
        finally:
            self._idle.put(worker)
        results: list[float | str] = found["results"]
        for reason in dict.fromkeys(result for result in results if isinstance(result, str)):
            self._log(function, reason, found["notes"].get(reason, ""))
        if found["again"] and found["again"][0] not in results:
            self._log(function, f"a call with several samples: {found['again'][0]}, repeated one by one", found["again"][1])
        return results

    def _log(self, function: FunctionReward, what: str, note: str) -> None:
        with self._lock:
            known = (function.name, what) in self._logged
            self._logged.add((function.name, what))
        if not known:
            lost = "" if "repeated" in what else " such samples are lost and counted,"
            logger.warning("reward function %s: %s;%s this is logged once%s", function.name, what, lost, f"\n{note.rstrip()}" if note else "")
