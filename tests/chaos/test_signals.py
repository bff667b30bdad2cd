"""A signal to a rank or the supervisor, in any phase: one whole checkpoint, exit code 75, no process left; then the run goes on to the same end."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.chaos.ground import Job, digest, make_ground, newest, undisturbed
from tests.e2e.programs import steps

pytestmark = pytest.mark.timeout(900)

STEPS = 4
PHASES = {"rollout": "gen", "score": "values", "update": "update_actor", "save": "save_checkpoint", "validation": "testing"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ground(tmp_path_factory.mktemp("signals"), STEPS)


@pytest.fixture(scope="module")
def expected(recipe: Path) -> str:
    return undisturbed(recipe, recipe.parent / "undisturbed", STEPS)


def disturbed(recipe: Path, name: str, number: signal.Signals, target: str, phase: str) -> Path:
    """The run folder of a job that got the signal in its second step."""
    run_dir = recipe.parent / name
    job = Job(recipe, run_dir, at=f"{PHASES[phase]}-2")
    job.wait_for_phase()
    ranks = job.ranks()
    assert len(ranks) == 2, job.family()
    {"rank 0": ranks[0], "last rank": ranks[1], "supervisor": job.process}[target].send_signal(number)
    assert job.wait() == 75, job.log.read_text()[-5000:]
    text = job.log.read_text()
    assert f"leaving: {number.name}" in text, text[-3000:]
    newest(run_dir)
    return run_dir


@pytest.mark.parametrize(("number", "target", "phase"), [(signal.SIGTERM, "supervisor", "rollout"), (signal.SIGUSR1, "last rank", "update")])
def test_left_and_gone_on(number: signal.Signals, target: str, phase: str, recipe: Path, expected: str) -> None:
    run_dir = disturbed(recipe, f"{number.name}-{target}-{phase}", number, target, phase)
    assert newest(run_dir).name.startswith("checkpoint-1+"), "it is saved inside of the step, not after it"
    job = Job(recipe, run_dir)
    assert job.wait() == 0
    assert digest(run_dir, STEPS) == expected
    assert steps(run_dir) == steps(recipe.parent / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("target", ["rank 0", "last rank", "supervisor"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_every_signal_target_and_phase(number: signal.Signals, target: str, phase: str, recipe: Path) -> None:
    disturbed(recipe, f"all-{number.name}-{target}-{phase}", number, target, phase)
