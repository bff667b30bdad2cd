"""trap 24, 26: a run that was killed, or that goes on from any of its checkpoints, ends with the bits of the run that was not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.conftest import Finished, Ground, grpo_recipe, ppo_recipe, sft_recipe
from tests.e2e.programs import Program, checkpoints, engine_hashes, metrics, sample_files, samples, steps, succeed, weight_hashes

pytestmark = pytest.mark.timeout(600)

CLOCK = ("time", "timing_s/", "tokens/", "model_flops/", "perf/", "rollout/throughput", "reward/latency_ms", "train/step_time_ms", "memory/")


def outcomes(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Everything in metrics.jsonl that is no measurement of time or work, by step: a line filled in after a kill has none of these."""
    return {line["step"]: {k: v for k, v in line.items() if not k.startswith(CLOCK)} for line in metrics(run_dir)}


def state(checkpoint: Path, recipe: bool = True) -> dict[str, Any]:
    """What the trainer keeps, without measurements of time."""
    found: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text())
    return {k: v for k, v in found.items() if k != "metrics" and (recipe or k != "recipe")}


def assert_same_end(straight: Path, resumed: Path, after: int, recipe: bool = True) -> None:
    """recipe: both were started with the same."""
    last = checkpoints(straight)[-1]
    assert checkpoints(resumed)[-1] == last
    a, b = straight / "checkpoints" / f"checkpoint-{last}", resumed / "checkpoints" / f"checkpoint-{last}"
    assert sample_files(straight, after) == sample_files(resumed, after)  # the next samples ...
    assert weight_hashes(a) == weight_hashes(b)  # ... the weights ...
    assert engine_hashes(a) == engine_hashes(b)  # ... master weights, moments and counters of every rank ...
    assert state(a, recipe) == state(b, recipe)
    assert steps(resumed) == steps(straight), "a line of metrics.jsonl is missing or doubled"
    assert outcomes(resumed) == outcomes(straight)  # ... and all that was measured


def stopped_after(straight: Finished, ground: Ground, step: int) -> Path:
    """The run folder as a kill long after step `step` could have left it: that checkpoint the newest, metrics and samples from later steps too."""
    run_dir = ground.run_dir(f"{straight.run_dir.name}-after-{step}")
    shutil.copytree(straight.run_dir, run_dir, symlinks=True)
    for later in checkpoints(run_dir):
        if later > step:
            shutil.rmtree(run_dir / "checkpoints" / f"checkpoint-{later}")
    for file in (run_dir / "samples").glob("training-*.jsonl"):
        if int(file.stem.split("-")[1]) > step:
            file.write_text("an older run was here\n")
    return run_dir


def killed_after(straight: Finished, ground: Ground, step: int) -> Path:
    """The same recipe, SIGKILL to all its processes as soon as checkpoint `step` is there."""
    run_dir = ground.run_dir(f"{straight.run_dir.name}-killed-{step}")
    program = Program(straight.recipe, f"run_dir={run_dir}", env=ground.env)
    program.wait_for(run_dir / "checkpoints" / f"checkpoint-{step}")
    program.kill()
    reached = checkpoints(run_dir)[-1]
    assert reached < checkpoints(straight.run_dir)[-1], "it was over before the kill"
    # Between a checkpoint and its metrics line are milliseconds, which the kill hits only at times: leave what it leaves then.
    lines = [line for line in (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True) if json.loads(line)["step"] < reached]
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    return run_dir


def go_on(straight: Finished, ground: Ground, run_dir: Path) -> None:
    outcome = succeed(straight.recipe, f"run_dir={run_dir}", "--resume", "auto", env=ground.env)
    assert "resumed from" in outcome.out


@pytest.mark.slow
def test_ppo_stopped_after_step_2(ppo: Finished, ground: Ground) -> None:
    """ZeRO-3, adaptive KL, 2 epochs x 2 minibatches, a learning rate that decays, the best checkpoint by validation."""
    coefficients = [line["actor/kl_coef"] for line in metrics(ppo.run_dir) if "actor/kl_coef" in line]
    assert len(set(coefficients)) > 6, "the coefficient does not move, so nothing would show that it was kept (trap 26)"
    run_dir = stopped_after(ppo, ground, 2)
    go_on(ppo, ground, run_dir)
    assert_same_end(ppo.run_dir, run_dir, after=2)


@pytest.mark.slow
def test_ppo_killed_after_step_3(ppo: Finished, ground: Ground) -> None:
    run_dir = killed_after(ppo, ground, 3)
    reached = checkpoints(run_dir)[-1]
    go_on(ppo, ground, run_dir)
    assert_same_end(ppo.run_dir, run_dir, after=reached - 1)


def test_ppo_goes_on_with_one_rank_and_zero_2(ppo: Finished, ground: Ground) -> None:
    """From two ranks under ZeRO-3: the same weights, so the same next samples; what follows may round otherwise."""
    run_dir = stopped_after(ppo, ground, 5)
    outcome = succeed(ppo.recipe, f"run_dir={run_dir}", "deepspeed=ds_configs/zero2.json", "train.steps=7", launcher="python", env=ground.env)
    assert "resumed from" in outcome.out
    expected, found = ([(row["prompt"], row["completion"]) for row in samples(folder, 6)] for folder in (ppo.run_dir, run_dir))
    assert found == expected
    assert checkpoints(run_dir)[-1] == 7 and steps(run_dir)[-1] == 7
    state_before, state_after = (json.loads((d / "checkpoints/checkpoint-6/trainer_state.json").read_text()) for d in (ppo.run_dir, run_dir))
    assert (state_before["world_size"], state_after["world_size"]) == (2, 1)


def test_flipped_bit_is_named_and_the_checkpoint_before_it_used(ppo: Finished, ground: Ground) -> None:
    run_dir = stopped_after(ppo, ground, 4)
    victim = sorted((run_dir / "checkpoints" / "checkpoint-4" / "critic").glob("rank-*.safetensors"))[1]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(content)
    outcome = succeed(ppo.recipe, f"run_dir={run_dir}", "train.steps=4", launcher="python", env=ground.env)
    assert f"{run_dir / 'checkpoints' / 'checkpoint-4'}: critic/{victim.name} is damaged" in outcome.out
    assert f"resumed from {run_dir / 'checkpoints' / 'checkpoint-3'}: going on after step 3" in outcome.out
    assert steps(run_dir) == [0, 1, 2, 3, 4]


# --------------------------------------------------------------------------------------------------------------------------
# The same for other states


@pytest.fixture(scope="module")
def others(ground: Ground, sft: Finished, reward_model: Finished) -> dict[str, dict[str, Any]]:
    """Recipes of straight runs, each with a state of its own kind."""
    short = {"steps": 6, "micro_batch": 16}
    every = {"checkpoint": {"every": 1, "keep_last": 100}}
    grpo = grpo_recipe(ground, sft.hf, **every, train=short, reward={"components": [{"function": "e2e_rewards:letter_a"}]})
    ppo = ppo_recipe(ground, sft.hf, reward_model.hf, train=short)
    pairs = yaml.safe_load(reward_model.recipe.read_text())
    pairs = {key: value for key, value in pairs.items() if key not in ("run_dir", "tracking")} | every
    return {
        "reward-model": pairs | {"train": {"steps": 6, "batch": 16, "micro_batch": 8}},
        "grpo-lora-zero2": {**grpo, "deepspeed": "ds_configs/zero2.json"},
        "ppo-zero2": {**ppo, "deepspeed": "ds_configs/zero2.json"},
        "ppo-zero1": {**ppo, "deepspeed": "ds_configs/zero1.json"},
        "ppo-zero0": {**ppo, "deepspeed": {"zero_optimization": {"stage": 0}}},
        "sft-zero3": sft_recipe(ground, **every, train={"steps": 6, "batch": 64, "micro_batch": 16}),
        "sft-zero0": sft_recipe(ground, **every, train={"steps": 6, "batch": 64, "micro_batch": 16}, deepspeed={"zero_optimization": {"stage": 0}}),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo-lora-zero2", "ppo-zero2", "ppo-zero1", "ppo-zero0", "sft-zero3", "sft-zero0", "reward-model"])
def test_other_states(name: str, others: dict[str, dict[str, Any]], ground: Ground) -> None:
    path = ground.recipe(name, others[name])
    straight = Finished(ground.run_dir(name), path, succeed(path, env=ground.env))
    for step in (2, 3):
        run_dir = stopped_after(straight, ground, step)
        go_on(straight, ground, run_dir)
        assert_same_end(straight.run_dir, run_dir, after=step)
