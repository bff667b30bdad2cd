"""Whole jobs that know secrets, have names that lead out of the run folder, and no network: nothing leaks, nothing leaves, nothing is missed."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch.utils.cpp_extension import get_default_build_root

from rlhf.distributed import EXIT_BAD
from rlhf.watchdog import EXIT_STALLED
from tests.chaos.ground import Job, make_ground, newest
from tests.e2e.programs import Outcome, metrics, reversal_rows, run, samples, without_network, write_jsonl

pytestmark = pytest.mark.timeout(600)

JUDGE = '''
import os
from pathlib import Path


def judge(completions, prompts, api_key, nested, url, **columns):
    """Right only if it has what the recipe says; tells it to whoever reads the log."""
    if (api_key, nested["token"], url) != tuple(os.environ["JUDGES"].split()):
        return [None] * len(completions)
    Path(os.environ["CHAOS_NOTES"], f"network-{os.environ['RANK']}").write_text(Path("/proc/net/dev").read_text())
    if any(prompt.startswith("a") for prompt in prompts):
        raise ValueError(f"401 for {url}?key={api_key}, with {os.environ['MY_JUDGE_TOKEN']}")
    return [sum(c < "n" for c in text) / 6 for text in completions]
'''
EVIL = "../../../evil"


@dataclass
class Planted:
    """Secrets where users have them."""

    folder: Path
    secrets: dict[str, str] = field(default_factory=dict)

    def secret(self, where: str, start: str = "") -> str:
        """One that is found nowhere else."""
        self.secrets[where] = f"{start}leak{len(self.secrets):02}{os.urandom(12).hex()}"
        return self.secrets[where]

    def plant(self) -> dict[str, Any]:
        """The environment, and what the recipe needs to know."""
        home = self.folder / "home"
        home.mkdir()
        names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "MY_JUDGE_TOKEN", "GIT_PASSWORD")
        self.env = {name: self.secret(name) for name in names} | {"WANDB_API_KEY": self.secret("WANDB_API_KEY").ljust(40, "0")}
        (home / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {self.secret('.netrc')}\n")
        for place in (home, self.folder):
            (place / ".deepspeed_env").write_text(f"SOME_TOKEN={self.secret(f'{place.name}/.deepspeed_env')}\n")
        remote = f"https://{self.secret('user of the git remote')}:{self.secret('password of the git remote')}@example.com/x.git"
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com"]
        for arguments in (["init", "-q"], ["remote", "add", "origin", remote], ["add", "recipe.yaml"], ["commit", "-qm", "x"]):
            subprocess.run([*git, *arguments], cwd=self.folder, check=True, capture_output=True)
        with (self.folder / "recipe.yaml").open("a") as recipe:
            recipe.write(f"# {self.secret('a line that git has not seen')}\n")
        extensions = os.environ.get("TORCH_EXTENSIONS_DIR") or f"{get_default_build_root()}/py3{sys.version_info.minor}_cpu"
        return {**self.env, "HOME": str(home), "HF_HOME": str(home / "huggingface"), "HF_HUB_OFFLINE": "0", "TORCH_EXTENSIONS_DIR": extensions}

    def assert_nowhere(self, *places: Path) -> None:
        files = [p for place in places for p in (place.rglob("*") if place.is_dir() else [place]) if p.is_file()]
        assert files
        for path in files:
            content = path.read_bytes() + str(path).encode()
            for where, secret in self.secrets.items():
                for form in (secret.encode(), base64.b64encode(secret.encode())[:-4]):
                    place = content.find(form)
                    assert place < 0, f"{where} is in {path}: {content[max(0, place - 200) : place + 50]!r}"


def prepare(folder: Path, steps: int, **changes: Any) -> tuple[Path, Planted, dict[str, str]]:
    planted = Planted(folder)
    arguments = {"api_key": planted.secret("api_key", "sk-"), "nested": {"token": planted.secret("token")}}
    arguments["url"] = f"https://judge:{planted.secret('password of an address')}@example.com"
    recipe = make_ground(
        folder,
        steps,
        reward={"components": [{"function": "judge:judge", "name": EVIL, "arguments": arguments}]},
        data={"train": {"path": folder / "rows.jsonl", "name": f"{EVIL}\0{'x' * 300}"}},
        validation={"data": [{"path": folder / f"{name}.jsonl"} for name in ("held_out", "other")], "verifier": "exact_match"},
        tracking={"wandb": "offline", "timeout": 20, "name": f"{EVIL}/canary"},
        checkpoint={"every": 1, "keep_last": 2, "save_hf": True},
        deepspeed={"zero_optimization": {"stage": 2}, "comet": {"enabled": False, "api_key": planted.secret("DeepSpeed's monitor")}},
        **changes,
    )
    (folder / "python" / "judge.py").write_text(JUDGE)
    held_out = reversal_rows(4, seed=1)
    write_jsonl(folder / "held_out.jsonl", [{**row, "data_source": EVIL} for row in held_out])
    write_jsonl(folder / "other.jsonl", [{**row, "data_source": "/tmp/evil\0" + "y" * 300} for row in held_out])
    env = planted.plant()
    return recipe, planted, {**env, "JUDGES": f"{arguments['api_key']} {arguments['nested']['token']} {arguments['url']}"}  # type: ignore[index]


@dataclass
class Done:
    folder: Path
    run_dir: Path
    planted: Planted
    before: list[Path]
    job: Job
    namespace: str | None  # why there is none


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """A run to its end, where there is no network if the system allows that."""
    folder = tmp_path_factory.mktemp("leaks") / "a" / "b" / "c"
    folder.mkdir(parents=True)
    recipe, planted, env = prepare(folder, 1)
    before, why = [], None
    try:
        before = without_network()
    except pytest.skip.Exception as reason:
        why = str(reason)
    there = sorted(p for p in folder.parents[2].rglob("*") if ".git" not in p.parts)
    job = Job(recipe, folder / "run", before=before, **env)
    assert job.wait() == 0, job.log.read_text()[-5000:]
    yield Done(folder, folder / "run", planted, there, job, why)


def test_secrets_are_nowhere(done: Done) -> None:
    assert any(row["reward"] > 0 for row in samples(done.run_dir, 1)), "it was given them"
    log = done.job.log.read_text()
    assert f'File "{done.folder}/python/judge.py"' in log, "and has told them"
    assert "ValueError: 401 for https://***@example.com?key=***, with ***" in log
    assert "api_key: '***'" in (done.run_dir / "config.yaml").read_text()
    (tracked,) = (done.run_dir / "wandb").glob("offline-run-*/*.wandb")
    content = tracked.read_bytes()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=done.folder, check=True, capture_output=True).stdout.strip()
    assert f"{EVIL}/canary".encode() in content and commit in content and b'"api_key":"***"' in content
    assert (newest(done.run_dir) / "hf" / "model.safetensors").is_file()
    done.planted.assert_nowhere(done.run_dir, done.job.log, done.job.notes)


def test_names_stay_in_the_run_folder(done: Done) -> None:
    mine = (done.run_dir, done.job.notes, done.job.log)
    now = sorted(p for p in done.folder.parents[2].rglob("*") if ".git" not in p.parts)
    home, compiled = done.folder / "home", done.folder / "python" / "__pycache__"
    new = [p for p in now if p not in done.before and not any(p.is_relative_to(place) for place in (*mine, home, compiled))]
    assert new == []
    assert not [p for p in (*home.rglob("*"), *done.run_dir.rglob("*"), *Path("/tmp").glob("evil*")) if "evil" in p.name]
    assert {f"val-core/{EVIL}/acc/n", f"reward/{EVIL}/mean"} <= metrics(done.run_dir)[-1].keys()


def test_no_network_is_needed(done: Done) -> None:
    if done.namespace:
        pytest.skip(done.namespace)
    for rank in (0, 1):
        lines = (done.job.notes / f"network-{rank}").read_text().splitlines()[2:]
        assert [line.split(":")[0].strip() for line in lines] == ["lo"]
    assert metrics(done.run_dir)[-1]["step"] == 1


@pytest.mark.slow
def test_a_tracker_that_cannot_be_reached(tmp_path: Path) -> None:
    """It goes on offline, and ends in time."""
    recipe, planted, env = prepare(tmp_path, 1, critic={}, algorithm={"name": "grpo"}, rollout={"prompts": 4, "group_size": 2, "max_new_tokens": 4})
    env |= {"PYTHONPATH": str(tmp_path / "python"), "CHAOS_NOTES": str(tmp_path), "CHAOS_KILL": ""}
    arguments = ("tracking.wandb=online", "tracking.timeout=4", "checkpoint.last=false", "checkpoint.every=0")
    outcome: Outcome = run(recipe, *arguments, launcher="python", env=env, before=without_network())
    assert outcome.code == 0 and outcome.seconds < 60, outcome.out[-3000:]
    assert "going on offline" in outcome.out and metrics(tmp_path / "run")[-1]["step"] == 1
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    planted.assert_nowhere(tmp_path / "run", next(tmp_path.glob("recipe-*.log")))


BREAK = """

if os.sys.argv[0].endswith("train_rlhf.py"):
    # The first attempt ends with an error in rank 1, in the second it stops, in the third no loss is a number.
    import signal

    import rlhf.trainers.rl

    attempt = Path(os.environ["CHAOS_NOTES"], f"attempt-of-{os.environ['RANK']}")
    number = len(attempt.read_text()) if attempt.exists() else 0
    attempt.write_text("x" * (number + 1))
    whole = rlhf.trainers.rl.policy_loss

    def policy_loss(*arguments, **keywords):
        if number == 0 and os.environ["RANK"] == "1":
            raise RuntimeError(f"broken, with {os.environ['MY_JUDGE_TOKEN']}")
        if number == 1 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        found = whole(*arguments, **keywords)
        found.loss_sum = found.loss_sum * float("nan")
        return found

    rlhf.trainers.rl.policy_loss = policy_loss
"""


@pytest.mark.slow
def test_secrets_are_in_nothing_that_a_failure_leaves(tmp_path: Path) -> None:
    """Traceback, kept output of attempts, stacks, the batch of bad steps."""
    recipe, planted, env = prepare(tmp_path, 9, train={"steps": 9, "micro_batch": 8, "bad_steps": 0, "stall_minutes": 0.6})
    with (tmp_path / "python" / "judge.py").open("a") as file:
        file.write(BREAK)
    job = Job(recipe, tmp_path / "run", **env)
    assert job.wait(500) == EXIT_BAD, job.log.read_text()[-5000:]
    log, run_dir = job.log.read_text(), tmp_path / "run"
    assert "RuntimeError: broken, with ***" in log and f"exit code {EXIT_STALLED}" in log
    assert len(list((run_dir / "attempts").iterdir())) == 2
    assert list(run_dir.glob("stalls/*/rank-*.txt")) and list(run_dir.glob("bad-step-*/samples.jsonl"))
    planted.assert_nowhere(run_dir, job.log, job.notes)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "python"])
def test_a_refusal_and_a_dry_run_show_none(tmp_path: Path, launcher: str) -> None:
    recipe, planted, env = prepare(tmp_path, 1)
    env |= {"PYTHONPATH": str(tmp_path / "python"), "CHAOS_NOTES": str(tmp_path), "CHAOS_KILL": ""}
    shown = run(recipe, "--dry_run", launcher=launcher, env=env)
    assert shown.code == 0 and '"api_key": "***"' in shown.out and "api_key: '***'" in shown.out
    refused = run(recipe, f"reward.components.0.arguments.api_key={planted.secret('command line')}", launcher=launcher, env=env)
    assert refused.code != 0 and "no secret may be there" in refused.out
    planted.assert_nowhere(*tmp_path.glob("recipe-*.log"))
    assert not (tmp_path / "run").exists()
