"""kill -9, and what the supervisor makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.chaos import STEPS, disturbed
from tests.chaos.ground import Job, make_ground, undisturbed

pytestmark = pytest.mark.timeout(900)

KILLS = [
    "1 rank update_actor-2 0.01",
    "0 launcher gen-2 0",
    "0 rank file-30 0",  # inside of the second save
    "0 rank save_checkpoint-3 0",
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ground(tmp_path_factory.mktemp("kills"), STEPS)


@pytest.fixture(scope="module")
def expected(recipe: Path) -> str:
    return undisturbed(recipe, recipe.parent / "undisturbed", STEPS)


@pytest.mark.parametrize("kill", KILLS)
def test_killed_and_brought_to_the_same_end(kill: str, recipe: Path, expected: str) -> None:
    found = disturbed(recipe, recipe.parent / kill.replace(" ", "-"), kill, expected)
    assert found["hit"] and found["same"], found


def test_the_supervisor_gives_up_where_nothing_changes_and_keeps_the_evidence(recipe: Path) -> None:
    """A reward that is no function of what it is given: the job ends each time, at the same step."""
    run_dir = recipe.parent / "hopeless"
    text = "import os\nimport rlhf.trainers.rl\n\nrlhf.trainers.rl.learn = lambda *a: os._exit(9)\nletters = print\n"
    (recipe.parent / "python" / "hopeless.py").write_text(text)
    job = Job(recipe, run_dir, "reward.components={function: hopeless:letters}")
    assert job.wait() == 9
    text = job.log.read_text()
    assert "failure 4 after the same checkpoint (none). Not started again." in text
    assert len(list((run_dir / "attempts").glob("*-exit-9.log"))) >= 1
