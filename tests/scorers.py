"""Reward functions for worker processes to import. Many do what their name says where completion or prompt begin with `bad`."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


def _is_bad(completion: str, prompt: str) -> bool:
    return completion.startswith("bad") or prompt.startswith("bad")


def _misbehaving(bad: Callable[[], Any]) -> Callable[..., list[Any]]:
    """1 for each completion, what `bad` returns for each `bad` one."""

    def function(completions: list[str], prompts: list[str], **columns: Any) -> list[Any]:
        return [bad() if _is_bad(text, prompt) else 1.0 for text, prompt in zip(completions, prompts, strict=True)]

    return function


def _raise() -> None:
    raise ValueError("as it was told")


def _endless() -> None:
    while True:
        pass


def _fork_bomb() -> None:
    while True:
        os.fork()


def wrong_length(completions: list[str], prompts: list[str], **columns: Any) -> list[float]:
    return [1.0 for text, prompt in zip(completions, prompts, strict=True) if not _is_bad(text, prompt)]


def wrong_type(completions: list[str], prompts: list[str], **columns: Any) -> Any:
    return "bad" if any(map(_is_bad, completions, prompts)) else [1.0] * len(completions)


raises = _misbehaving(_raise)
none = _misbehaving(lambda: None)
nan = _misbehaving(lambda: float("nan"))
infinite = _misbehaving(lambda: float("inf"))
large = _misbehaving(lambda: 1e308)
slow = _misbehaving(lambda: time.sleep(60))
endless = _misbehaving(_endless)
exits = _misbehaving(lambda: os._exit(3))
segfaults = _misbehaving(lambda: ctypes.string_at(0))
fork_bomb = _misbehaving(_fork_bomb)

TWELVE = {
    "raises": "raised ValueError",
    "none": "None",
    "nan": "NaN",
    "infinite": "infinite",
    "wrong_length": "wrong length",
    "wrong_type": "returned str instead of a list",
    "large": "beyond float32",
    "slow": "timeout",
    "endless": "timeout",
    "exits": "died (exit 3)",
    "segfaults": "died (SIGSEGV)",
    "fork_bomb": "more than 256 processes",
}

# Beyond the twelve: exits politely, an engine that never lets the interpreter go, noise on standard output, forks that come back, daemons.
leaves = _misbehaving(lambda: sys.exit(3))
regex = _misbehaving(lambda: re.match(r"(a+)+$", "a" * 60 + "b"))
closes = _misbehaving(lambda: os.closerange(3, 64))
stops = _misbehaving(lambda: os.kill(os.getpid(), signal.SIGSTOP))


def noisy(completions: list[str], **columns: Any) -> list[float]:
    print('{"all": [7]}', flush=True)
    os.write(1, b'{"one": 7}\n')
    return [1.0] * len(completions)


def returning_fork(completions: list[str], **columns: Any) -> list[float]:
    os.fork()
    return [float(text) for text in completions]


def daemon(completions: list[str], **columns: Any) -> list[float]:
    """Leaves a process in a session of its own behind, says which, and hangs if told so."""
    found = [subprocess.Popen(["sleep", "600"], start_new_session=True).pid for _ in completions]
    if "bad" in completions:
        time.sleep(600)
    return [float(pid) for pid in found]


def told(completions: list[str], **columns: Any) -> list[float]:
    """The number that a completion is; `wait` waits."""
    return [time.sleep(600) if text == "wait" else float(text) for text in completions]  # type: ignore[misc]


def waiting(completions: list[str], seconds: float, **columns: Any) -> list[float]:
    """Takes `seconds` for each sample, as a server does."""
    time.sleep(seconds * len(completions))
    return [float(len(completions))] * len(completions)


def first_token(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
    """The response's first token id; odd ones are lost."""
    return [None if ids[0] % 2 else float(ids[0]) for ids in completion_ids]


def process(completions: list[str], **columns: Any) -> list[float]:
    return [float(os.getpid())] * len(completions)


def surroundings(completions: list[str], **columns: Any) -> list[float]:
    """Writes what a worker knows of the trainer's interpreter where the completion says."""
    with open(completions[0], "w") as file:
        json.dump([sys.path, os.environ.get("PYTHONHASHSEED"), os.getcwd(), [m for m in ("torch", "pydantic", "numpy") if m in sys.modules]], file)
    return [1.0]


def asleep(completions: list[str], **columns: Any) -> list[float]:
    """Writes the ids of scorer and child where the completion says, and hangs."""
    child = subprocess.Popen(["sleep", "600"], start_new_session=True).pid
    with open(completions[0] + ".new", "w") as file:
        json.dump([os.getpid(), os.getppid(), child], file)
    os.rename(completions[0] + ".new", completions[0])
    time.sleep(600)
    return [1.0]


def type_of(value: list[Any], expected: list[str], **columns: Any) -> list[bool]:
    return [f"{type(v).__module__}.{type(v).__qualname__}" == e for v, e in zip(value, expected, strict=True)]


def third_is_lost(completion_ids: list[list[int]]) -> list[float | None]:
    return [None if len(ids) == 4 else 10.0 * len(ids) for ids in completion_ids]


def half(prompts: list[str]) -> list[float | None]:
    return [0.5] * len(prompts)


def position(completions: list[str], **columns: Any) -> list[float]:
    """Where a sample stands in its call."""
    return [float(i) for i in range(len(completions))]
