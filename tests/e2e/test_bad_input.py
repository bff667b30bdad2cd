"""What users get wrong, and what data and rewards do wrong: named before a model loads, or counted and survived."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import Ground, grpo_recipe, sft_recipe
from tests.e2e.programs import ROOT, Outcome, Program, engine_hashes, environment, metrics, run, samples, steps, succeed, weight_hashes, write_jsonl
from tests.scorers import TWELVE

pytestmark = pytest.mark.timeout(600)


def assert_refused(outcome: Outcome, *parts: str) -> None:
    """Exit code 2 and one message, once, without a traceback."""
    assert outcome.code == 2, outcome.out[-3000:]
    assert outcome.out.count("error: ") == 1, outcome.out[-3000:]
    assert "Traceback" not in outcome.out
    for part in parts:
        assert part in outcome.out, outcome.out[-3000:]


# --------------------------------------------------------------------------------------------------------------------------
# Before a model loads. Where a model folder is named, its weights are not readable: a run that got so far would say something else.


def test_forty_malformed_rows_stop_the_run(ground: Ground) -> None:
    """Through the launcher: one message from two ranks, with file and line."""
    recipe = sft_recipe(ground, actor={"path": ground.folder / "unreadable"}, data={"train": {"path": ground.folder / "malformed.jsonl"}})
    outcome = run(ground.recipe("malformed", recipe), env=ground.env)
    assert_refused(
        outcome,
        "40 bad rows",
        "data.on_bad_row=skip",
        "malformed.jsonl:1: blank line",
        "malformed.jsonl:16: not valid JSON: Expecting ',' delimiter",
        "... and 30 more",
    )
    assert not (ground.run_dir("malformed") / "checkpoints").exists()


def test_wrong_keys_values_and_tasks(ground: Ground) -> None:
    """Found before torch is imported, so in a second; file and line are named."""
    good = ground.recipe("keys", sft_recipe(ground))
    text = good.read_text()
    line = 1 + text.splitlines().index("  learning_rate: 0.004")
    wrong_key = good.with_name("wrong_key.yaml")
    wrong_key.write_text(text.replace("  learning_rate: 0.004", "  learning_rat: 0.004"))
    wrong_task = good.with_name("wrong_task.yaml")
    wrong_task.write_text(text.replace("task: sft", "task: dpo"))
    cases = [
        (wrong_key, [], [f"{wrong_key}:{line}: unknown key `actor.learning_rat`", "did you mean `actor.learning_rate`?"]),
        (wrong_task, [], ["`task`", "'sft', 'reward_model' or 'rl'", "(given: 'dpo')"]),
        (good, ["actor.learning_rte=1"], ["command line: unknown key `actor.learning_rte`", "did you mean `actor.learning_rate`?"]),
        (good, ["actor.learning_rate=fast"], ["command line: `actor.learning_rate`", "(given: 'fast')"]),
        (good, ["nonsense"], ["override 'nonsense': write key.sub=value"]),
        (good, ["train.micro_batch=0"], ["`train.micro_batch`", "greater than or equal to 1"]),
        (good.with_name("absent.yaml"), [], ["absent.yaml: No such file"]),
    ]
    for recipe, arguments, parts in cases:
        outcome = run(recipe, *arguments, launcher="python", env=ground.env)
        assert_refused(outcome, *parts)
        assert outcome.seconds < 10


STARTS = """
import contextlib, io, json, sys
import train_rlhf
results = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["train_rlhf.py", *arguments]
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = train_rlhf.main()
    results.append([code, stderr.getvalue()])
print(json.dumps(results))
"""


def test_wrong_folders_and_functions(ground: Ground) -> None:
    """Model folders, reward functions, verifier, DeepSpeed JSON and resume path, one start after the other in one process: imports take seconds."""
    binary = ground.folder / "binary"
    shutil.copytree(ground.folder / "base", binary)
    (binary / "model.safetensors").rename(binary / "pytorch_model.bin")
    recipe = ground.recipe("folders", grpo_recipe(ground, ground.folder / "unreadable"))
    unanswered = write_jsonl(ground.folder / "unanswered.jsonl", [{"prompt": "ab>"}])
    held_out = f"validation.data.path={ground.folder}/held_out.jsonl"
    cases = [
        ([f"actor.path={ground.folder}/absent"], ["actor.path=", "no such model folder"]),
        ([f"actor.path={binary}"], ["actor.path=", "no *.safetensors in it", "save_pretrained"]),
        (["reward.components.0.function=exact_mach"], ["reward function 'exact_mach': unknown", "did you mean 'exact_match'?"]),
        (["reward.components.0.function=e2e_rewards:letter_b"], ["e2e_rewards has no 'letter_b'", "did you mean 'letter_a'?"]),
        (["reward.components.0.function=e2e_reward:letter_a"], ["importing 'e2e_reward' failed"]),
        (["reward.components.0={function: length_penalty, arguments: {targt: 3}}"], ["'length_penalty': needs 'target'", "did you mean 'targt'?"]),
        (["reward.components.0.function=exact_match", f"data.train.path={unanswered}"], ["'exact_match': needs 'answer', which is no column"]),
        ([held_out, "validation.verifier=exact_mach"], ["reward function 'exact_mach': unknown"]),
        (["deepspeed=ds_configs/zero4.json"], ["deepspeed=ds_configs/zero4.json: no such file"]),
        (["data.train.path=/absent.jsonl"], ["data.train.path=/absent.jsonl: no such file"]),
        (
            [f"validation.data.path={ground.folder}/held_out.txt", "validation.verifier=exact_match"],
            ["validation.data.path=", "no such file; did you"],
        ),
        (["--resume=/absent/checkpoint-1"], ["/absent/checkpoint-1: no readable manifest.json", "--resume never"]),
    ]
    starts = json.dumps([["--config", str(recipe), *arguments] for arguments, _ in cases])
    env = environment(**{**ground.env, "PYTHONPATH": f"{ground.env['PYTHONPATH']}:{ROOT}"})
    done = subprocess.run([sys.executable, "-c", STARTS, starts], capture_output=True, text=True, env=env, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    for (code, message), (arguments, parts) in zip(json.loads(done.stdout.splitlines()[-1]), cases, strict=True):
        assert code == 2 and message.startswith("error: ") and "Traceback" not in message, (arguments, message)
        for part in parts:
            assert part in message, (arguments, message)


# --------------------------------------------------------------------------------------------------------------------------
# While it runs


def lossy_rows() -> list[dict[str, str]]:
    """Three steps of eight prompts in file order. After `x` the model ends at once, else it never does; `z` raises, `y` gives None."""
    mixed = ["abx", "cdx", "abc", "abd", "az", "bz", "ay", "gh"]
    all_lost = ["ay", "by", "cy", "dy", "ey", "fy", "gy", "az"]
    endless = ["ab", "ac", "ad", "ae", "af", "ag", "ah", "bc"]
    return [{"prompt": p} for p in [*mixed, *all_lost, "toolongaprompt", *endless]]


def lossy_recipe(ground: Ground, **changes: Any) -> dict[str, Any]:
    return {
        "task": "rl",
        "actor": {"path": ground.folder / "ends", "learning_rate": 1e-4},
        "data": {"train": {"path": ground.folder / "lossy.jsonl"}, "shuffle": False, "max_prompt_tokens": 8},
        "reward": {"components": [{"function": "e2e_rewards:early_letters"}], "missing_eos_penalty": 0.5},
        "rollout": {"prompts": 8, "group_size": 2, "max_new_tokens": 5},
        "algorithm": {"name": "grpo"},
        "validation": {"samples": 1000},
        "train": {"steps": 3, "micro_batch": 4},
        "checkpoint": {"every": 1, "keep_last": 9},
        **changes,
    }


def assert_lossy_run(run_dir: Path, model: Path) -> None:
    assert steps(run_dir) == [1, 2, 3]
    first, second, third = metrics(run_dir)
    # Step 1: `z` raised and `y` gave None, twice each for z: those samples are lost, the others have their rewards.
    assert first["reward/invalid"] == 6
    assert first["reward_failures/early_letters/raised ValueError"] == 4 and first["reward_failures/early_letters/None"] == 2
    assert first["train/skipped_updates"] == 0 and first["actor/grad_norm"] > 0
    for row in samples(run_dir, 1):
        if row["prompt"].endswith("x"):  # an empty response: the end token alone, which is scored and trains
            assert (row["completion"], row["length"], row["stop_reason"], row["reward"]) == ("", 1, "eos", -1.0)
        else:
            assert (row["length"], row["stop_reason"]) == (5, "length")
        if row["prompt"][-1] in "yz":
            assert row["components"]["early_letters"] is None and row["reward"] == 0 and row["advantage"] == 0
        elif not row["prompt"].endswith("x"):
            assert row["reward"] == pytest.approx(row["components"]["early_letters"] - 0.5, abs=1e-6)  # never ended: the penalty
    assert first["response_length/clip_ratio"] == 12 / 16
    # Step 2: all lost, so nothing is trained, by any rank, and neither is an old gradient (trap 22).
    assert second["reward/invalid"] == 16
    assert second["train/skipped_updates"] == 1 and "actor/grad_norm" not in second
    folders = [run_dir / "checkpoints" / f"checkpoint-{n}" for n in (1, 2, 3)]
    assert engine_hashes(folders[0]) == engine_hashes(folders[1]) != engine_hashes(folders[2])
    assert weight_hashes(folders[0]) == weight_hashes(folders[1]) != weight_hashes(folders[2])
    before, after = (load_file(f / "model.safetensors") for f in (model, folders[0] / "hf"))
    assert any(not torch.equal(before[name], after[name]) for name in before), "the samples that were not lost did not train"
    # Step 3: nothing ends, and training goes on.
    assert third["reward/invalid"] == 0 and third["train/skipped_updates"] == 0 and third["actor/grad_norm"] > 0
    assert third["response_length/clip_ratio"] == 1.0


def test_samples_are_lost_and_the_run_goes_on(ground: Ground) -> None:
    """trap 22, 27, through the launcher on two ranks: an over-long prompt, empty and endless responses, a reward that raises or gives None."""
    write_jsonl(ground.folder / "lossy.jsonl", lossy_rows())
    outcome = succeed(ground.recipe("lossy", lossy_recipe(ground)), env=ground.env)
    assert "lossy: 24 rows, 1 dropped (longer than data.max_prompt_tokens=8)" in outcome.out
    assert_lossy_run(ground.run_dir("lossy"), ground.folder / "ends")


@pytest.mark.slow
def test_samples_are_lost_under_ppo_too(ground: Ground) -> None:
    """With a critic, a reference and a KL coefficient that must not move when nothing was learnt; the long prompt is truncated and kept."""
    rows = lossy_rows()
    rows.append(rows.pop(16))  # the long one last, so that it is the 25th
    write_jsonl(ground.folder / "lossy-ppo.jsonl", rows)
    recipe = lossy_recipe(
        ground,
        data={"train": {"path": ground.folder / "lossy-ppo.jsonl"}, "shuffle": False, "max_prompt_tokens": 8, "on_long_prompt": "truncate"},
        algorithm={"name": "ppo", "kl": {"coef": 0.1, "controller": "adaptive", "target": 0.1, "horizon": 100}},
    )
    outcome = succeed(ground.recipe("lossy-ppo", recipe), env=ground.env)
    assert "lossy-ppo: 25 rows, 1 truncated" in outcome.out
    run_dir = ground.run_dir("lossy-ppo")
    assert_lossy_run(run_dir, ground.folder / "ends")
    assert "critic/grad_norm" not in metrics(run_dir)[1]
    states = [json.loads((run_dir / "checkpoints" / f"checkpoint-{n}" / "trainer_state.json").read_text()) for n in (1, 2, 3)]
    assert states[0]["kl_controller"] == states[1]["kl_controller"] != states[2]["kl_controller"]


def test_a_lock_that_a_killed_process_left(ground: Ground) -> None:
    """DeepSpeed compiles an operator behind a lock file; left behind by a kill it would hang every later start without a word."""
    from torch.utils.cpp_extension import get_default_build_root

    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or f"{get_default_build_root()}/py3{sys.version_info.minor}_cpu") / "deepspeed_shm_comm"
    assert (cache / "deepspeed_shm_comm.so").is_file(), "tests/conftest.py compiles the operator before any test"
    own = ground.folder / "extensions"
    shutil.copytree(cache, own / cache.name)
    (own / cache.name / "lock").touch()
    recipe = ground.recipe("lock", sft_recipe(ground, train={"steps": 1}, checkpoint={"last": False}, validation={}))
    outcome = succeed(recipe, launcher="python", env={**ground.env, "TORCH_EXTENSIONS_DIR": str(own)})
    assert "left behind by a killed process, removed" in outcome.out


def test_a_failing_rank_ends_the_job(ground: Ground) -> None:
    """Rank 1 raises in the update while rank 0 waits for it: all processes end at once, and the cause is on the screen."""
    recipe = lossy_recipe(ground, reward={"components": [{"function": "e2e_broken_rank:zero"}]})
    write_jsonl(ground.folder / "lossy.jsonl", lossy_rows())
    program = Program(ground.recipe("broken_rank", recipe), env=ground.env)
    outcome = program.wait(100)  # the process group would wait for half an hour
    assert outcome.code not in (0, 2)
    assert "RuntimeError: rank one breaks here" in outcome.out and "Traceback" in outcome.out
    assert outcome.out.index("rank one breaks here") < outcome.out.index("exits with return code")


@pytest.mark.slow
def test_twelve_misbehaving_functions_in_one_run(ground: Ground) -> None:
    """trap 27: each loses the samples of one prompt of four and no other, in training and validation, and nothing of it is left when the run ends."""
    rows = write_jsonl(ground.folder / "twelve.jsonl", [{"prompt": p} for p in ("abc", "bad", "cd", "ef")])
    recipe = lossy_recipe(
        ground,
        data={"train": {"path": rows}, "shuffle": False},
        reward={"components": [{"function": f"tests.scorers:{name}"} for name in TWELVE], "timeout": 1.0, "workers": 2},
        rollout={"prompts": 4, "group_size": 2, "max_new_tokens": 5},
        validation={"data": {"path": rows}, "verifier": "tests.scorers:exits", "before_training": False},
        train={"steps": 1, "micro_batch": 4},
        checkpoint={"last": False},
    )
    outcome = succeed(ground.recipe("twelve", recipe), launcher="python", env=ground.env)
    (line,) = metrics(ground.run_dir("twelve"))
    assert line["reward/invalid"] == 2 and line["val-aux/verifier/failed"] == 1
    assert line["val-core/twelve/acc/n"] == 3 and line["val-core/twelve/acc/mean@1"] == 1.0  # of those that were judged
    found = {key.removeprefix("reward_failures/"): n for key, n in line.items() if key.startswith("reward_failures/")}
    assert found == {f"{name}/{reason}": 2 for name, reason in TWELVE.items()}
    assert outcome.out.count("such samples are lost and counted") == 12  # each once
    for row in samples(ground.run_dir("twelve"), 1):
        assert set(row["components"].values()) == ({None} if row["prompt"] == "bad" else {1.0})
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if any("tests.scorers:fork_bomb" in word for word in p.info["cmdline"] or [])]
    assert not left
