"""trap 27, 28: reward functions in processes of their own. Whatever they do costs the samples it is done to, and nothing is left of it."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from rlhf.config import ROOT, RewardComponentConfig
from rlhf.rewards.functions import FunctionReward
from rlhf.rewards.pool import Pool
from tests.scorers import TWELVE

BEYOND = {"leaves": "raised SystemExit", "regex": "timeout", "closes": "died (exit 1)", "stops": "timeout"}


def mine(name: str, **arguments: Any) -> FunctionReward:
    return FunctionReward(RewardComponentConfig(function=name if name == "reasoning_gym" else f"tests.scorers:{name}", arguments=arguments))


@contextmanager
def pool_of(*names: str, workers: int = 1, timeout: float = 30.0) -> Iterator[Pool]:
    with Pool([mine(name).path for name in names], workers, timeout) as pool:
        yield pool


def score(
    pool: Pool, name: str, completions: list[str], arguments: dict[str, Any] | None = None, **columns: list[Any]
) -> tuple[list[Any], dict[str, int]]:
    ids = [[ord(c) % 1000 for c in text[:9]] for text in completions]
    scores, failures = pool.score(mine(name, **(arguments or {})), ["p"] * len(completions), completions, ids, columns)
    return scores, dict(failures)


def family(pool: Pool) -> list[psutil.Process]:
    """The pool's guards and all below them."""
    guards = [psutil.Process(worker.process.pid) for worker in pool.workers]
    return [p for guard in guards for p in (guard, *guard.children(recursive=True))]


def assert_gone(pids: list[int], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while left := [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < end, [psutil.Process(pid) for pid in left]
        time.sleep(0.02)


# --------------------------------------------------------------------------------------------------------------------------
# What functions do


@pytest.mark.parametrize(("name", "reason"), [*TWELVE.items(), *BEYOND.items()])
def test_only_the_sample_at_fault_is_lost_and_the_pool_is_whole(name: str, reason: str) -> None:
    with pool_of(name, timeout=0.5 if reason == "timeout" else 20) as pool:
        assert score(pool, name, ["a", "bad", "b", "c"]) == ([1, None, 1, 1], {reason: 1})
        assert score(pool, name, ["bad"]) == ([None], {reason: 1})
        assert score(pool, name, ["a", "b"]) == ([1, 1], {})
        members = family(pool)
        assert len(members) == 2, "a guard with its scorer, and nothing else"
    assert_gone([p.pid for p in members])


def test_what_is_printed_and_who_comes_back_from_a_fork_are_no_answers(capfd: pytest.CaptureFixture[str]) -> None:
    with pool_of("noisy", "returning_fork") as pool:
        for i in range(4):
            assert score(pool, "noisy", ["a", "b"]) == ([1, 1], {})
            assert score(pool, "returning_fork", [str(i), str(i + 1)]) == ([i, i + 1], {})
    assert '{"all": [7]}' in capfd.readouterr().err


def test_what_has_left_the_process_group_ends_too() -> None:
    with pool_of("daemon", timeout=1.0) as pool:
        (left, none), failures = score(pool, "daemon", ["a", "bad"])
        assert none is None and failures == {"timeout": 1}
        assert_gone([int(left)], 5)
        (stays,), _ = score(pool, "daemon", ["a"])
        assert psutil.pid_exists(int(stays)), "a server that a function has started stays while its scorer does"
    assert_gone([int(stays)], 5)


def test_an_endless_sample_costs_two_timeouts_whatever_the_batch() -> None:
    """One for the call with all, one alone; the 63 others are not waited for."""
    with pool_of("told", timeout=1.0) as pool:
        score(pool, "told", ["0"])
        began = time.monotonic()
        scores, failures = score(pool, "told", [*map(str, range(63)), "wait"])
        assert scores == [*range(63), None] and failures == {"timeout": 1}
        assert time.monotonic() - began < 8


def test_a_function_that_hangs_on_everything_is_given_up_and_tried_again() -> None:
    """Ten timeouts in a row without a score, and the rest of the call is not tried; of the next call one sample is, and decides."""
    with pool_of("told", timeout=0.1) as pool:
        scores, failures = score(pool, "told", ["wait"] * 40)
        assert scores == [None] * 40
        assert failures["timeout"] + failures["not tried"] == 40 and 3 <= failures["timeout"] <= 10  # each costs 0.1 s, and what a busy machine adds
        assert score(pool, "told", ["wait", "1"]) == ([None, None], {"timeout": 1, "not tried": 1})
        assert score(pool, "told", ["1", "2", "wait", "3"]) == ([1, 2, None, 3], {"timeout": 1})


def test_reasons_are_logged_once_with_where_it_happened(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), pool_of("raises", "endless", "segfaults", timeout=0.5) as pool:
        for name in ("raises", "raises", "endless", "endless", "segfaults"):
            score(pool, name, ["a", "bad"])
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert "raised ValueError" in messages[0] and 'raise ValueError("as it was told")' in messages[0] and "worker.py" not in messages[0]
    assert "timeout" in messages[1] and "in _endless" in messages[1]
    assert "died (SIGSEGV)" in messages[2] and "string_at" in messages[2]


def test_a_call_that_is_repeated_for_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), pool_of("waiting", timeout=0.8) as pool:
        assert score(pool, "waiting", ["a"] * 4, {"seconds": 0.3}) == ([1] * 4, {})
    assert [r.getMessage().splitlines()[0] for r in caplog.records] == [
        "reward function waiting: a call with several samples: timeout, repeated one by one; this is logged once"
    ]


# --------------------------------------------------------------------------------------------------------------------------
# What happens to the processes


def test_a_killed_worker_is_replaced_and_its_sample_scored_again() -> None:
    with pool_of("process", "waiting") as pool:
        (first,), _ = score(pool, "process", ["a"])
        os.kill(int(first), signal.SIGKILL)  # while idle
        (second,), failures = score(pool, "process", ["a"])
        assert second != first and not failures
        guard = pool.workers[0].process.pid
        os.kill(guard, signal.SIGKILL)
        (third,), failures = score(pool, "process", ["a"])
        assert third not in (first, second) and not failures
        assert_gone([guard, int(second)])
        for place in (1, 0):  # scorer, then guard, while at work
            found: list[Any] = []
            thread = threading.Thread(target=lambda: found.append(score(pool, "waiting", ["a"], {"seconds": 1.0})))  # noqa: B023
            thread.start()
            time.sleep(0.3)
            members = [p.pid for p in family(pool)]
            os.kill(members[place], signal.SIGKILL)
            assert_gone(members[1:], 0.5)
            thread.join()
            assert found == [([1], {})]


def test_a_guard_that_was_stopped_is_replaced() -> None:
    """Its own timeouts stop with it."""
    with pool_of("process", "waiting", timeout=2.0) as pool:
        (first,), _ = score(pool, "process", ["a"])
        guard = pool.workers[0].process.pid
        os.kill(guard, signal.SIGSTOP)
        began = time.monotonic()
        (second,), failures = score(pool, "process", ["a"])
        assert second != first and not failures and time.monotonic() - began < 10
        assert_gone([guard, int(first)])


def test_a_worker_ends_with_its_pool_while_at_work() -> None:
    with pool_of("waiting", workers=2) as pool:
        threads = [threading.Thread(target=score, args=(pool, "waiting", ["a"], {"seconds": 600})) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        members = [p.pid for p in family(pool)]
        began = time.monotonic()
    assert time.monotonic() - began < 15, "nobody had to be killed"
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert len(members) == 4
    assert_gone(members)


TRAINER = """
import sys
from tests.test_pool import pool_of, score
with pool_of("asleep", workers=2) as pool:
    score(pool, "asleep", [sys.argv[1]])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_killed_trainer(number: int, tmp_path: Path) -> None:
    """Neither guards nor scorers nor what these have started, in the middle of a call and idle."""
    path = tmp_path / "pids"
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, str(path)], cwd=ROOT)
    end, members = time.monotonic() + 60, []
    while not path.exists() or len(members) < 5:
        assert trainer.poll() is None and time.monotonic() < end
        time.sleep(0.02)
        with contextlib.suppress(psutil.NoSuchProcess):  # one that ends while they are listed
            members = [p.pid for p in psutil.Process(trainer.pid).children(recursive=True)]
    assert set(json.loads(path.read_text())) <= set(members)
    trainer.send_signal(number)
    trainer.wait(10)
    assert_gone(members)


# --------------------------------------------------------------------------------------------------------------------------
# What a worker knows


def test_a_worker_imports_as_the_trainer_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sys.path, hash seed and folder are the trainer's own; nothing heavy is imported that the function does not import itself."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "user_module.py").write_text("def one(completions, **columns):\n    return [1.0] * len(completions)\n")
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    path = tmp_path / "found.json"
    with Pool(["user_module:one", "tests.scorers:surroundings"]) as pool:
        one = FunctionReward(RewardComponentConfig(function="user_module:one"))
        assert pool.score(one, ["p"], ["a"], [[1]], {}) == ([1.0], Counter())
        assert score(pool, "surroundings", [str(path)]) == ([1], {})
    found_path, seed, folder, heavy = json.loads(path.read_text())
    assert (found_path, seed, folder, heavy) == (sys.path, "7", os.getcwd(), [])


def test_columns_of_any_kind_arrive_as_they_are() -> None:
    values = [1, "\ud800 \0 \u0663", b"\xff", None, {"a": [1.5]}, datetime.datetime(2024, 1, 1), decimal.Decimal("1.10"), np.float32(1), np.arange(3)]
    expected = [f"{type(v).__module__}.{type(v).__qualname__}" for v in values]
    with pool_of("type_of") as pool:
        assert score(pool, "type_of", ["x"] * len(values), value=values, expected=expected) == ([1] * len(values), {})
        values[1] = threading.Lock()
        assert score(pool, "type_of", ["x"] * len(values), value=values, expected=expected) == ([1, None] + [1] * 7, {"not picklable": 1})


def test_module_that_dies_on_import_in_the_worker_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "import_once.py").write_text(
        "import os, sys\nif 'pytest' not in sys.modules:\n    os._exit(4)\n\ndef one(completions):\n    return [1.0] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    one = FunctionReward(RewardComponentConfig(function="import_once:one"))
    with Pool([one.path]) as pool:
        for _ in range(2):
            assert pool.score(one, ["p"] * 2, ["a"] * 2, [[1]] * 2, {}) == ([None, None], Counter({"died (exit 4) on import": 2}))


# --------------------------------------------------------------------------------------------------------------------------
# Mathematics

MEGA = 1_000_000


def pathological(canary: Path) -> list[str]:
    """Fifty texts; any that is evaluated leaves a file."""
    touch = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    numbers = ["9" * MEGA, "-" + "9" * 5000, "1" + ",111" * 250_000 + "1", "0." + "0" * MEGA, "." * MEGA, "$" * MEGA, "-" * MEGA, "1e999999999"]
    powers = ["10**10**10", "9**9**9**9", "2**(10**9)", "(1+x)**(10**7)", "factorial(10**9)", "1/0", "0**-1", "1 << 10**10", "10!!!!!!", "'a'*10**10"]
    nested = [
        "(" * 1000 + ")" * 1000,
        "[" * MEGA,
        "{" * 5000 + "}" * 5000,
        "-~" * 3000 + "1",
        "(" * 90 + "1" + ")" * 90,
        "sin(" * 300 + "x" + ")" * 300,
    ]
    code = [
        touch,
        f"[{touch}]",
        f"exec({touch!r})",
        f"lambda: {touch}",
        f"(lambda: {touch})()",
        f"x if {touch} else y",
        f"{{{touch}}}",
        f"f'{{{touch}}}'",
    ]
    code += [f"sqrt({touch})", "().__class__.__base__.__subclasses__()", "x.__class__", "Symbol('x').free_symbols", "open('/etc/passwd').read()"]
    unicode = [
        "\u0661\u0662\u0663",
        "\u2212\u0665",
        "\uff11\uff12",
        "\u00b2\u00bd",
        "\u221e",
        "\ud800\udfff",
        "\0\0\0",
        "1\0002",
        "\u202e21",
        "\U0001f600",
    ]
    slow = ["<answer>" * 100_000, "a" * 5000 + "!", "x " * 100_000 + "####" * 100_000]
    texts = [*numbers, *powers, *nested, *code, *unicode, *slow]
    assert len(texts) == 50
    return texts


@pytest.mark.parametrize("name", ["gsm8k", "last_number"])
def test_numbers_are_found_in_pathological_texts(name: str, tmp_path: Path) -> None:
    """Each is scored 0 or lost, and the right answers between them are right: in one call with all, and one by one."""
    function = FunctionReward(RewardComponentConfig(function=name))
    texts = [text for bad in pathological(tmp_path / "evaluated") for text in (bad, "#### 5")]
    with Pool([name], 1, 5.0) as pool:
        scores, failures = pool.score(function, ["p"] * 100, texts, [[1]] * 100, {"answer": ["#### 5"] * 100})
        assert len(family(pool)) == 2
    assert scores[1::2] == [1] * 50 and set(scores[::2]) <= {0, None}
    assert scores.count(None) == failures.total() == 0, "all of them can be judged"
    assert not (tmp_path / "evaluated").exists()


def assert_survived(tasks: list[str], canary: Path, timeout: float) -> None:
    from reasoning_gym.factory import create_dataset

    function = FunctionReward(RewardComponentConfig(function="reasoning_gym"))
    bad = [*pathological(canary)[:25], *(f"so <answer>{text}</answer>" for text in pathological(canary)[25:])]
    with Pool(["reasoning_gym"], 1, timeout) as pool:
        for task in tasks:
            entry = create_dataset(task, size=1, seed=3)[0]
            right = entry["answer"] if isinstance(entry["answer"], str) else entry["metadata"]["premises"][0]
            texts = [text for b in bad for text in (b, right)]
            columns = {"entry": [entry] * 100, "task": [task] * 100, "task_config": [None] * 100}
            scores, failures = pool.score(function, ["p"] * 100, texts, [[1]] * 100, columns)
            best = 1.0 if isinstance(entry["answer"], str) else 0.25  # of a premise as its own conclusion
            assert scores[1::2] == [best] * 50, task
            assert all(s is None or s <= 0.25 for s in scores[::2]), task
            assert scores.count(None) == failures.total(), task
            assert not canary.exists(), task
            assert len(family(pool)) == 2, task


def test_reasoning_gym_survives_pathological_texts(tmp_path: Path) -> None:
    """A task that hands answers to sympy's parser, and one that evaluates them."""
    assert_survived(["simple_integration", "string_insertion"], tmp_path / "evaluated", 1.5)


TASKS = ["binary_matrix", "countdown", "intermediate_integration", "n_queens", "number_sorting", "polynomial_multiplication", "puzzle24"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_more_tasks_survive_pathological_texts(tmp_path: Path) -> None:
    assert_survived([*TASKS, "spiral_matrix", "prime_factorization", "propositional_logic"], tmp_path / "evaluated", 1.5)


def test_no_task_of_reasoning_gym_evaluates_an_answer(tmp_path: Path) -> None:
    """trap 28, all hundred of them: texts that leave a file if they are evaluated."""
    from reasoning_gym.factory import DATASETS, create_dataset

    canary = tmp_path / "evaluated"
    texts = [text for text in pathological(canary) if str(canary) in text]
    entries = {name: create_dataset(name, size=1, seed=3)[0] for name in DATASETS if name != "composite"}  # composite: of the others
    pairs = [(name, text) for name in entries for text in texts]
    columns = {"entry": [entries[name] for name, _ in pairs], "task": [name for name, _ in pairs]}
    with pool_of("reasoning_gym") as pool:
        scores, failures = score(pool, "reasoning_gym", [text for _, text in pairs], **columns)
    assert len(texts) >= 8 and len(entries) > 100
    assert not canary.exists()
    assert len(scores) == len(pairs) and all(reason.startswith("raised ") for reason in failures), failures


def test_the_hard_timeout_holds_for_a_task_of_reasoning_gym(tmp_path: Path) -> None:
    """sympy takes for ever to simplify what the answer of an integration leads to; the others of the call have their scores."""
    from reasoning_gym.factory import create_dataset

    entry = create_dataset("simple_integration", size=1, seed=3)[0]
    variable = entry["metadata"]["variable"]
    monster = "*".join(f"sin({k}*{variable} + {k + 1})**{k + 7}/(cos({variable}**{k}) + {k})" for k in range(1, 40))
    columns = {"entry": [entry] * 3, "task": ["simple_integration"] * 3}
    with pool_of("reasoning_gym", timeout=1.2) as pool:
        scores, failures = score(pool, "reasoning_gym", [entry["answer"], monster, entry["answer"]], **columns)
    assert scores == [1, None, 1] and failures == {"timeout": 1}
