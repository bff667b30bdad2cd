"""Whole jobs under the supervisor: kill -9, and signals that ask them to leave. The end is that of a job that nobody touched; no process is left."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from scripts.chaos import STEPS, disturbed
from tests.chaos.ground import Job, digest, make_ground, newest, undisturbed
from tests.e2e.programs import steps

pytestmark = pytest.mark.timeout(900)

KILLS = (
    "1 rank update_actor-1 0.01",
    "0 inner gen-1 0",  # after which the launcher says that all is well
    "0 rank file-20 0",  # inside of a save
    "0 launcher gen-1 0",
)
PHASES = {
    "loading": "start-0",
    "rollout": "gen-2",
    "score": "values-2",
    "update": "update_actor-2",
    "save": "save_checkpoint-2",
    "validation": "testing-2",
}
SIGNALS = [
    pytest.param(number, target, phase, marks=pytest.mark.slow)
    for number in (signal.SIGTERM, signal.SIGUSR1)
    for target in ("rank 0", "last rank", "all ranks", "supervisor")
    for phase in PHASES
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ground(tmp_path_factory.mktemp("jobs"), STEPS)


@pytest.fixture(scope="module")
def expected(recipe: Path) -> str:
    return undisturbed(recipe, recipe.parent / "undisturbed", STEPS)


@pytest.mark.parametrize("times", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_killed_several_times(times: int, recipe: Path, expected: str) -> None:
    found = disturbed(recipe, recipe.parent / f"killed-{times}", ";".join(KILLS[:times]), lambda: expected)
    assert found["hit"] and found["same"], found


@pytest.mark.parametrize(("number", "target", "phase"), SIGNALS)
def test_asked_to_leave(number: signal.Signals, target: str, phase: str, recipe: Path, expected: str) -> None:
    """One whole checkpoint and exit code 75, in whatever phase of the second step, and before there are models; then to the same end."""
    run_dir = recipe.parent / f"{number.name}-{target}-{phase}"
    job = Job(recipe, run_dir, at=PHASES[phase])
    job.wait_for_phase()
    ranks = job.ranks()
    assert len(ranks) == 2, job.family()
    for process in {"rank 0": ranks[:1], "last rank": ranks[1:], "all ranks": ranks, "supervisor": [job.process]}[target]:
        process.send_signal(number)
    assert job.wait() == 75, job.log.read_text()[-5000:]
    text = job.log.read_text()
    assert f"leaving: {number.name}" in text and f"supervise: saved and left: {number.name}" in text, text[-3000:]
    left = newest(run_dir)
    expected_name = {"save": "checkpoint-2", "loading": "checkpoint-0+1"}.get(phase, "checkpoint-1+")
    assert left.name.startswith(expected_name), "inside of the step, not after it"
    job = Job(recipe, run_dir)
    assert job.wait() == 0
    assert digest(run_dir, STEPS) == expected
    assert steps(run_dir) == steps(recipe.parent / "undisturbed")
