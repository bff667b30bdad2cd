"""A reward model and PPO with LoRA through the launcher, all four roles of PPO on one frozen base."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from tests.e2e.conftest import Finished, Ground, ppo_recipe
from tests.e2e.programs import checkpoints, engine_hashes, metrics, run, succeed, weight_hashes

pytestmark = pytest.mark.timeout(600)
ZERO_2 = {"deepspeed": "ds_configs/zero2.json"}


@pytest.fixture(scope="module")
def lora_reward_model(ground: Ground) -> Finished:
    recipe = {
        "task": "reward_model",
        "reward_model": {"path": ground.folder / "base", "learning_rate": 1e-2, "lora": {"r": 8}},
        "data": {"train": {"path": ground.folder / "pairs.jsonl"}},
        "train": {"steps": 6, "batch": 64, "micro_batch": 32},
        **ZERO_2,
    }
    path = ground.recipe("lora_reward_model", recipe)
    return Finished(ground.run_dir("lora_reward_model"), path, succeed(path, env=ground.env))


@pytest.fixture(scope="module")
def ppo_on_one_base(ground: Ground, lora_reward_model: Finished) -> Finished:
    adapter = lora_reward_model.run_dir / "checkpoints" / "latest" / "adapter"
    recipe = ppo_recipe(ground, ground.folder / "base", adapter, **ZERO_2)
    recipe["actor"] |= {"lora": {"r": 8}, "learning_rate": 1e-2}
    recipe["critic"] = {"share_base": True, "learning_rate": 1e-2}
    recipe["reward"]["components"][1]["model"]["share_base"] = True
    recipe["train"]["steps"] = 4
    path = ground.recipe("ppo_on_one_base", recipe)
    return Finished(ground.run_dir("ppo_on_one_base"), path, succeed(path, env=ground.env))


def test_a_run_on_one_base_trains_both_and_leaves_the_actors_adapter(ground: Ground, ppo_on_one_base: Finished) -> None:
    lines = metrics(ppo_on_one_base.run_dir)[1:]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["actor/kl"] == pytest.approx(0, abs=1e-6) and lines[-1]["actor/kl_per_response"] > 1e-3
    assert lines[0]["critic/values/mean"] == 0 and lines[-1]["critic/values/mean"] != 0
    assert all(abs(line["reward/reward_model/mean"]) < 5 for line in lines)  # centred and scaled by the statistics beside the adapter
    adapter = ppo_on_one_base.run_dir / "checkpoints" / "latest" / "adapter"
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert names and all(".lora_A.weight" in name or ".lora_B.weight" in name for name in names)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((ground.folder / "base").resolve()) and config["task_type"] == "CAUSAL_LM"


@pytest.mark.slow
def test_it_goes_on_with_the_same_bits(ground: Ground, ppo_on_one_base: Finished) -> None:
    run_dir = ground.run_dir("ppo_on_one_base_again")
    first = ppo_on_one_base.run_dir / "checkpoints" / "checkpoint-2"
    outcome = succeed(ppo_on_one_base.recipe, f"run_dir={run_dir}", "--resume", str(first), env=ground.env)
    assert "going on after step 2" in outcome.out and checkpoints(run_dir) == [3, 4]
    straight, resumed = (folder / "checkpoints" / "checkpoint-4" for folder in (ppo_on_one_base.run_dir, run_dir))
    assert weight_hashes(straight) == weight_hashes(resumed) and engine_hashes(straight) == engine_hashes(resumed)


def test_zero_3_is_refused_before_a_model_loads(ground: Ground, ppo_on_one_base: Finished) -> None:
    outcome = run(ppo_on_one_base.recipe, "deepspeed=ds_configs/zero3.json", f"run_dir={ground.run_dir('none')}", launcher="python", env=ground.env)
    assert outcome.code == 2
    assert "error: share_base=true: ZeRO-3 can not run two engines on one base" in outcome.out and "Traceback" not in outcome.out
    assert not ground.run_dir("none").exists()
