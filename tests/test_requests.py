"""What a running job may be asked from outside."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from rlhf import requests
from rlhf.requests import SAVE, SLOW_DISK, STOP, Requests, started
from rlhf.trainers.run import take_folder
from train_rlhf import seconds


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As in a terminal: SIGINT is ignored in whatever a shell has put into the background, and so perhaps in these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "asked"),
    [(signal.SIGTERM, [STOP, STOP]), (signal.SIGUSR1, [STOP, STOP]), (signal.SIGINT, [STOP, STOP]), (signal.SIGRTMIN, [SAVE, 0])],
)
def test_signals(interruptible: None, tmp_path: Path, number: signal.Signals, asked: list[int]) -> None:
    before = signal.getsignal(number)
    with Requests(tmp_path) as found:
        assert found.poll() == 0
        os.kill(os.getpid(), number)
        assert [found.poll(), found.poll()] == asked
        assert asked[0] == SAVE or found.reason == number.name
    assert signal.getsignal(number) == before


def test_a_second_interrupt_is_pythons_own(interruptible: None, tmp_path: Path) -> None:
    with Requests(tmp_path), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_that_the_shell_has_ignored_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Requests(tmp_path) as found:
            os.kill(os.getpid(), signal.SIGINT)
            assert found.poll() == 0
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_files_of_this_run_and_none_of_an_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stop").touch()
    os.utime(tmp_path / "stop", (0, 0))
    with Requests(tmp_path) as found:
        assert found.poll() == 0 and (tmp_path / "stop").exists(), "another job may be waiting for it"
        (tmp_path / "save").touch()
        assert [found.poll(), found.poll()] == [SAVE, 0]
        (tmp_path / "save").touch()
        (tmp_path / "stop").touch()
        assert found.poll() == STOP and found.reason == f"the file {tmp_path / 'stop'}", "the reason to leave, not the one to save"
        assert not list(tmp_path.iterdir())
    monkeypatch.setenv("RANK", "1")
    with Requests(tmp_path) as other:
        (tmp_path / "stop").touch()
        assert other.poll() == 0, "one rank looks, and tells the others"


def test_a_stop_file_is_asked_of_the_job_and_not_of_one_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Touched between two attempts it is older than the next; read by one that is killed before it has saved, it is gone."""
    control, run_dir = tmp_path / "control", tmp_path / "run"
    control.mkdir(), run_dir.mkdir()
    monkeypatch.setenv(requests.CONTROL, str(control))
    monkeypatch.setenv(requests.STARTED, str(psutil.Process().create_time() - 100))
    (run_dir / "stop").touch()
    before = psutil.Process().create_time() - 50
    os.utime(run_dir / "stop", (before, before))
    assert Requests(run_dir).poll() == STOP and not (run_dir / "stop").exists()
    assert Requests(run_dir).poll() == STOP, "the next attempt hears of it from the supervisor's folder"


def test_a_stop_that_comes_while_a_save_is_taken_is_not_lost(tmp_path: Path) -> None:
    found = Requests(tmp_path)
    found._ask(SAVE, "SIGRTMIN")
    assert found.poll() == SAVE
    found._ask(SAVE, "SIGRTMIN")
    found._ask(STOP, "SIGTERM")
    found._ask(SAVE, "SIGRTMIN")
    assert [found.poll(), found.poll()] == [STOP, STOP] and found.reason == "SIGTERM"


def test_the_supervisor_hears_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(requests.CONTROL, str(tmp_path))
    with Requests(tmp_path / "run") as found:
        assert (tmp_path / "run_dir").read_text() == str(tmp_path / "run")
        (tmp_path / "stop").write_text("SIGTERM at the supervisor\n")
        assert found.poll() == STOP and found.reason == "SIGTERM at the supervisor"
        found.leave(requests.GONE)
        assert not (tmp_path / "left").exists(), "a launcher that was killed has asked for nothing"
        found.leave(found.reason)
        assert (tmp_path / "left").read_text() == "SIGTERM at the supervisor"


def test_max_time_leaves_room_for_what_took_longest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(requests.STARTED, str(time.time() - 90))
    expecting = Requests(tmp_path, 100.0)
    assert expecting.poll() == 0
    expecting.expect_save(int(6 * SLOW_DISK))
    assert expecting.poll() == STOP, "room for a first save too"
    found = Requests(tmp_path, 100.0)
    found.expect_save(int(6 * SLOW_DISK))
    found.saved(1.0)
    assert [found.poll(), found.poll()] == [0, 0], "one that has been says how long they take"
    found.saved(6.0)
    assert found.poll() == STOP and found.reason == "--max_time 100 s is near"
    monkeypatch.delenv(requests.STARTED)
    assert started() == pytest.approx(psutil.Process().create_time())


@pytest.mark.parametrize(
    ("text", "expected"), [("90", 5400), ("1:30", 90), ("23:50:00", 85_800), ("1-12", 129_600), ("1-12:30", 131_400), ("0-0:0:5", 5)]
)
def test_times_as_slurm_writes_them(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "1:2:3:4", "-5", "soon"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        seconds(text)


def test_a_run_folder_has_one_job(tmp_path: Path) -> None:
    with ExitStack() as first, ExitStack() as second:
        assert take_folder(tmp_path, first) is None
        refused = take_folder(tmp_path, second)
        assert refused is not None and f"another job is at work there (process {os.getpid()} on " in refused
        first.close()
        assert take_folder(tmp_path, second) is None
