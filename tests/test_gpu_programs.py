"""Whole programs on one GPU that nothing else uses: they learn, a first step takes what was planned, and a device that is too small is enough."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from rlhf.distributed import EXIT_AGAIN
from scripts.chaos import make_random
from tests.e2e.programs import EOS, SHARDED, make_model, metrics, reversal_rows, run, steps, write_jsonl, write_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400), pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SMALL_DEVICE = '''
"""A device of DEVICE_GIB: the rest of it is taken, unseen. At EXTRA_AT EXTRA_GIB more are gone that the plan does not know of."""

import ctypes
import os
import sys

import torch


def take(gib):
    torch.zeros(1, device="cuda")
    torch.cuda.empty_cache()
    code = ctypes.CDLL("libcuda.so.1").cuMemAlloc_v2(ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(int(gib * 2**30)))
    assert code == 0, code


def odd(completions, completion_ids, **columns):
    return [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids]


def letter_a(completions, **columns):
    return [text.count("a") / 6 for text in completions]


extra, at, updates = float(os.environ.get("EXTRA_GIB", 0)), os.environ.get("EXTRA_AT"), 0
if "DEVICE_GIB" in os.environ and sys.argv[0].endswith("train_rlhf.py"):  # not where rewards are computed
    import rlhf.preflight
    import rlhf.trainers.run
    from rlhf.metrics.timing import PhaseTimer

    size, whole, memory = int(float(os.environ["DEVICE_GIB"]) * 2**30), PhaseTimer.phase, torch.cuda.mem_get_info

    def phase(self, name, *arguments, **keywords):
        global updates
        updates += name == "update_actor"
        if name == "update_actor" and at == f"update {updates}":
            take(extra)
        return whole(self, name, *arguments, **keywords)

    take((torch.cuda.get_device_properties(0).total_memory - size) / 2**30 + extra * (at == "start"))
    torch.cuda.mem_get_info = lambda device=None: (memory(device)[0], size)
    for module in (rlhf.preflight, rlhf.trainers.run):
        module.device_capacity = lambda: size
    PhaseTimer.phase = phase
'''


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    make_model(folder / "tiny")
    make_model(folder / "base")
    make_random(folder / "base", "0.5B")
    write_jsonl(folder / "rows.jsonl", reversal_rows(400))
    (folder / "python").mkdir()
    (folder / "python" / "small_device.py").write_text(SMALL_DEVICE)
    return folder


def merge(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {**tree, **{k: merge(tree.get(k, {}), v) if isinstance(v, dict) else v for k, v in changes.items()}}


def recipe_of(folder: Path, name: str, changes: dict[str, Any]) -> Path:
    """GRPO of 0.5B on 256 rows of 500 response tokens, with a cache for 1,024: 25.7 GiB in its update, 6 of them the cache."""
    recipe = {
        "task": "rl",
        "run_dir": folder / name,
        "actor": {"path": folder / "base", "learning_rate": 1e-6},
        "data": {"train": {"path": folder / "rows.jsonl"}},
        "reward": {"components": [{"function": "small_device:odd"}]},
        "rollout": {"prompts": 64, "group_size": 4, "max_new_tokens": 500, "max_batch": 1024},
        "algorithm": {"name": "grpo", "kl": {"coef": 0.01}},
        "train": {"steps": 3, "packing": True, "micro_batch_tokens": 8192},
        "checkpoint": {"every": 0, "last": False, "save_hf": False},
    }
    return write_recipe(folder / f"{name}.yaml", merge(recipe, changes))


def compared(run_dir: Path) -> dict[str, tuple[float, float]]:
    """(measured, planned) GB of the phases of the first step."""
    first = metrics(run_dir)[0]
    found = {key.removesuffix("_planned_gb"): (first[key.replace("_planned", "")], first[key]) for key in first if key.endswith("_planned_gb")}
    print(json.dumps({"bench": "plan", "case": run_dir.name, **found}))
    return found


def as_planned(run_dir: Path) -> bool:
    return all(abs(measured - planned) <= 0.1 * planned for measured, planned in compared(run_dir).values())


CASES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "grpo-zero2": {"deepspeed": "ds_configs/zero2.json"},
    "grpo-offload-mlp": {"actor": {"offload": True, "gradient_checkpointing": "mlp"}, "reference": {"offload": True}},
    "grpo-lora": {"actor": {"lora": {"r": 64, "target_modules": "all-linear"}}, "train": {"micro_batch_tokens": "auto"}},
    "ppo": {
        "critic": {"init": "actor"},
        "rollout": {"prompts": 256, "group_size": 1},
        "algorithm": {"name": "ppo", "epochs": 2},
        "train": {"micro_batch_tokens": 16_384},
    },
}


@pytest.mark.parametrize(("deepspeed", "gpus"), [("zero3", 1), ("zero2", 1), ("zero3", 2)])
def test_rewards_rise(ground: Path, deepspeed: str, gpus: int) -> None:
    """GRPO, all weights, 20 steps: from 0.03 to 0.99 on a CPU, in float32 and in bfloat16 alike. Two ranks: every parameter in parts."""
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    changes = {
        "deepspeed": SHARDED if gpus > 1 else f"ds_configs/{deepspeed}.json",
        "actor": {"path": ground / "tiny", "learning_rate": 2e-3},
        "reward": {"components": [{"function": "small_device:letter_a"}]},
        "rollout": {"prompts": 32, "group_size": 8, "max_new_tokens": 6},
        "algorithm": {"kl": {"coef": 0.001, "place": "loss", "estimator": "k3_corrected"}, "minibatches": 2},
        "train": {"steps": 20, "micro_batch_tokens": 512},
    }
    name = f"learns-{deepspeed}-{gpus}"
    launcher = "deepspeed" if gpus > 1 else "python"
    outcome = run(recipe_of(ground, name, changes), launcher=launcher, env={"PYTHONPATH": str(ground / "python")}, timeout=150)
    assert outcome.code == 0, outcome.out[-6000:]
    scores = [line["critic/score/mean"] for line in metrics(ground / name)]
    assert scores[0] < 0.1 and scores[-1] > 0.9, scores


@pytest.mark.parametrize(("case", "gpus"), [*((case, 1) for case in CASES), ("grpo", 2), ("ppo", 2)])
def test_a_first_step_takes_what_was_planned(ground: Path, case: str, gpus: int) -> None:
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    changes = merge(CASES[case], {"train": {"steps": 1}, "rollout": {"max_batch": 1024 // gpus}})
    case += f"-{gpus}" * (gpus > 1)
    launcher = "deepspeed" if gpus > 1 else "python"
    outcome = run(recipe_of(ground, case, changes), launcher=launcher, env={"PYTHONPATH": str(ground / "python")}, timeout=150)
    assert outcome.code == 0, outcome.out[-6000:]
    assert {"memory/gen", "memory/ref", "memory/update_actor"} <= compared(ground / case).keys()
    assert as_planned(ground / case) and "GiB measured of planned" not in outcome.out


# Shapes of published models whose layers are not llama's: gemma-3-1b, OLMo-2-1B, stablelm-2-1.6b, pythia-410m, opt-1.3b, starcoder2 with 12 layers.
OTHERS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1}
    | {"head_dim": 256, "vocab_size": 262_144, "sliding_window": 512},
    "olmo2": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16, "vocab_size": 100_352},
    "stablelm": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 32, "vocab_size": 100_352},
    "gpt_neox": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 50_304},
    "opt": {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32, "vocab_size": 50_272}
    | {"word_embed_proj_dim": 2048},
    "starcoder2": {"hidden_size": 3072, "intermediate_size": 12_288, "num_hidden_layers": 12, "num_attention_heads": 24, "vocab_size": 49_152}
    | {"num_key_value_heads": 2, "sliding_window": 4096},
}


@pytest.mark.parametrize("change", ["", "compile", "mlp", "lora"])
@pytest.mark.parametrize("family", [*OTHERS, "qwen2"])
def test_a_first_step_of_other_families_takes_what_was_planned(ground: Path, family: str, change: str) -> None:
    folder = ground / "base"
    if family != "qwen2":
        folder = ground / family
        shutil.copytree(ground / "tiny", folder, dirs_exist_ok=True)
        ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": EOS}
        torch.manual_seed(0)
        architecture = CONFIG_MAPPING[family](**OTHERS[family], **ends)
        with torch.device("cuda"):
            AutoModelForCausalLM.from_config(architecture, dtype=torch.bfloat16).save_pretrained(folder)
        torch.cuda.empty_cache()
    actor = {"path": folder, "compile": change == "compile", "gradient_checkpointing": "mlp" if change == "mlp" else False}
    changes = {
        "actor": actor | ({"lora": {"r": 64, "target_modules": "all-linear"}} if change == "lora" else {}),
        "rollout": {"prompts": 32, "max_batch": 128},
        "train": {"steps": 1},
    }
    name = f"{family}-{change}".strip("-")
    outcome = run(recipe_of(ground, name, changes), launcher="python", env={"PYTHONPATH": str(ground / "python")}, timeout=200)
    assert outcome.code == 0, outcome.out[-6000:]
    assert as_planned(ground / name) and "GiB measured of planned" not in outcome.out
    shutil.rmtree(ground / family, ignore_errors=True)


def test_the_cache_gives_way_on_a_small_device(ground: Path) -> None:
    env = {"PYTHONPATH": str(ground / "python"), "DEVICE_GIB": "24"}
    outcome = run(recipe_of(ground, "small", {}), launcher="python", env=env, timeout=150)
    assert outcome.code == 0 and steps(ground / "small") == [1, 2, 3], outcome.out[-6000:]
    assert "the KV cache has 2." in outcome.out and as_planned(ground / "small"), outcome.out[-6000:]
    assert not (ground / "small" / "budget.json").exists()


def test_what_is_smaller_than_it_says_gives_back_the_rollout(ground: Path) -> None:
    """3.5 of 24 GiB are gone before the ranks try the largest forward; tokens stay as many."""
    env = {"PYTHONPATH": str(ground / "python"), "DEVICE_GIB": "24", "EXTRA_GIB": "3.5", "EXTRA_AT": "start"}
    outcome = run(recipe_of(ground, "smaller", {}), launcher="python", env=env, timeout=150)
    assert outcome.code == 0 and steps(ground / "smaller") == [1, 2, 3], outcome.out[-6000:]
    assert "update_actor does not fit on 1 of 1 ranks: going on with rollout.release=True" in outcome.out, outcome.out[-6000:]
    assert json.loads((ground / "smaller" / "budget.json").read_text()) == {"rollout.release": True}


def test_what_becomes_smaller_is_started_again_without_the_rollout(ground: Path) -> None:
    """The same in the second update: memory runs out, the program asks to be started again, and that fits."""
    env = {"PYTHONPATH": str(ground / "python"), "DEVICE_GIB": "24", "EXTRA_GIB": "3.5", "EXTRA_AT": "update 2"}
    recipe = recipe_of(ground, "became smaller", {"checkpoint": {"every": 1}})
    outcome = run(recipe, launcher="python", env=env, timeout=150)
    assert outcome.code == EXIT_AGAIN, outcome.out[-6000:]
    for part in ("out of memory in phase update_actor", "of 24.0 GiB,", "planned for it: 2", "actor: moments", "rollout.release=True"):
        assert part in outcome.out, outcome.out[-6000:]
    assert json.loads((ground / "became smaller" / "budget.json").read_text()) == {"rollout.release": True}
    outcome = run(recipe, "--resume", "auto", launcher="python", env=env, timeout=150)
    assert outcome.code == 0 and steps(ground / "became smaller") == [1, 2, 3], outcome.out[-6000:]
