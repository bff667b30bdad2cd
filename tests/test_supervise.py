"""scripts/supervise.sh around jobs that are three lines of shell."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from rlhf.config import ROOT
from rlhf.requests import own, resumes


class Supervised:
    def __init__(self, folder: Path, job: str, **env: str) -> None:
        """job: a script; $RUN is its run folder, which the supervisor is told."""
        self.run_dir = folder / "run"
        (self.run_dir / "checkpoints").mkdir(parents=True)
        script = folder / "job.sh"
        script.write_text(f'RUN={self.run_dir}; echo "$RUN" > "$RLHF_CONTROL/run_dir"; echo "attempt" >> "$RUN/attempts.txt"\n{job}\n')
        self.log = folder / "log"
        with self.log.open("w") as log:
            environment = {"PATH": "/usr/bin:/bin", "PAUSE": "0", "GRACE": "1", **env}
            command = ["bash", str(ROOT / "scripts" / "supervise.sh"), "bash", str(script)]
            # A shell cannot trap what is ignored when it starts, as SIGINT is in whatever a shell has put into the background.
            heard = signal.signal(signal.SIGINT, signal.SIG_DFL)
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            signal.signal(signal.SIGINT, heard)

    @property
    def attempts(self) -> int:
        file = self.run_dir / "attempts.txt"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def wait_for(self, file: str) -> None:
        end = time.monotonic() + 20
        while not (self.run_dir / file).exists():
            assert time.monotonic() < end
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("job", "code"), [('touch "$RLHF_CONTROL/done"', 0), ("exit 2", 2), ("exit 77", 77), ('touch "$RLHF_CONTROL/left"; exit 75', 75)]
)
def test_what_is_not_started_again(tmp_path: Path, job: str, code: int) -> None:
    run = Supervised(tmp_path, job)
    assert run.process.wait(20) == code
    assert run.attempts == 1


def test_gives_up_after_as_many_failures_at_the_same_checkpoint_and_keeps_what_was_printed(tmp_path: Path) -> None:
    """The third attempt writes a checkpoint, so four more are made."""
    step = '[ "$(wc -l < "$RUN/attempts.txt")" -ge 3 ] && ln -sfn checkpoint-5 "$RUN/checkpoints/latest"'
    run = Supervised(tmp_path, f"{step}\necho something went wrong; sleep 1; exit 9")
    assert run.process.wait(60) == 9
    assert run.attempts == 6
    assert "failure 4 after the same checkpoint (checkpoint-5). Not started again." in run.log.read_text()
    logs = list((run.run_dir / "attempts").glob("*-exit-9.log"))
    assert len(logs) == 6 and all(log.read_text() == "something went wrong\n" for log in logs)


def test_a_launcher_that_says_all_is_well_is_not_believed(tmp_path: Path) -> None:
    """DeepSpeed's ends with 0 when the process below it was killed."""
    run = Supervised(tmp_path, '[ "$(wc -l < "$RUN/attempts.txt")" -ge 2 ] && touch "$RLHF_CONTROL/done"\nexit 0')
    assert run.process.wait(20) == 0
    assert run.attempts == 2


def test_memory_that_runs_out_is_no_failure(tmp_path: Path) -> None:
    """As long as the budget becomes smaller each time; else it is one like any other."""
    job = '[ "$(wc -l < "$RUN/attempts.txt")" -ge 6 ] && touch "$RLHF_CONTROL/done" && exit 0\n'
    run = Supervised(tmp_path / "smaller", job + 'cp "$RUN/attempts.txt" "$RUN/budget.json"; exit 75')
    assert run.process.wait(20) == 0
    assert run.attempts == 6
    run = Supervised(tmp_path / "same", job + "exit 75")
    assert run.process.wait(20) == 75
    assert run.attempts == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_job_may_take_its_time(tmp_path: Path, number: signal.Signals) -> None:
    job = (
        'touch "$RUN/up"; while [ ! -e "$RLHF_CONTROL/stop" ]; do sleep 0.05; done; sleep 0.5; cp "$RLHF_CONTROL/stop" "$RLHF_CONTROL/left"; exit 75'
    )
    run = Supervised(tmp_path, job)
    run.wait_for("up")
    run.process.send_signal(number)
    assert run.process.wait(20) == 75
    assert f"saved and left: {number.name} at the supervisor" in run.log.read_text()


def test_a_signal_between_two_attempts(tmp_path: Path) -> None:
    run = Supervised(tmp_path, 'touch "$RUN/up"; exit 9', PAUSE="300")
    run.wait_for("up")
    time.sleep(0.5)
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(4) == 75, "it does not sleep on"


def test_no_process_outlives_its_attempt(tmp_path: Path) -> None:
    run = Supervised(tmp_path, "(trap '' TERM; echo $BASHPID > \"$RUN/child\"; sleep 60; sleep 60) &\nsleep 0.3; exit 2")
    assert run.process.wait(20) == 2
    child = int((run.run_dir / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_nor_does_one_in_a_session_of_its_own(tmp_path: Path) -> None:
    """As torchrun's and accelerate's agents start their ranks; the agent is killed."""
    job = 'setsid bash -c "trap \'\' TERM; echo \\$\\$ > $RUN/rank; sleep 60; sleep 60" &\nwhile [ ! -s "$RUN/rank" ]; do sleep 0.05; done; exit 2'
    run = Supervised(tmp_path, job)
    assert run.process.wait(20) == 2
    child = int((run.run_dir / "rank").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert "processes were left after 1 s: killed" in run.log.read_text()


@pytest.mark.parametrize("code", [2, 77])
def test_launchers_that_end_with_1_whatever_their_ranks_do(tmp_path: Path, code: int) -> None:
    run = Supervised(tmp_path, f'echo {code} > "$RLHF_CONTROL/code"; exit 1')
    assert run.process.wait(20) == code
    assert run.attempts == 1
    run = Supervised(tmp_path / "full", f': > "$RLHF_CONTROL/code"; exit {code}')  # on a full disk
    assert run.process.wait(20) == code


def test_resume_never_is_meant_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line stays the same when a job is started again; what it has saved since must not be set aside."""
    monkeypatch.setenv("RLHF_CONTROL", str(tmp_path))
    assert resumes("never", tmp_path) == "never"
    (tmp_path / "saved").touch()
    assert resumes("never", tmp_path) == resumes("some/checkpoint", tmp_path) == "auto"
    monkeypatch.delenv("RLHF_CONTROL")
    assert resumes("never", tmp_path) == "never"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    (tmp_path / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    assert resumes("some/checkpoint", tmp_path) == "some/checkpoint", "that one is an older run's, which has not been set aside yet"
    own(tmp_path)
    assert resumes("some/checkpoint", tmp_path) == "auto"
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    assert resumes("never", tmp_path) == "never", "another job's"
