"""Cases that a review found broken."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from rlhf.config import _RENAMED, _ZERO, ROOT, LoraConfig, parse_config, role_settings
from rlhf.distributed import World
from rlhf.engine import _clear_abandoned_builds
from rlhf.models.heads import ScalarModel
from rlhf.models.lora import add_adapters
from rlhf.preflight import check
from rlhf.trainers.run import Best, check_same_data
from tests.helpers import run_ranks, single_world


def test_overrides_may_stand_between_and_after_options() -> None:
    import train_rlhf

    parsed = train_rlhf.parse_arguments(["--local_rank=0", "a.b=1", "--config", "x.yaml", "c=2", "--resume", "never", "d=3"])
    assert (parsed.overrides, parsed.resume, parsed.local_rank) == (["a.b=1", "c=2", "d=3"], "never", 0)


_RL = {
    "task": "rl",
    "run_dir": "run",
    "actor": {"path": "m"},
    "data": {"train": {"path": "x.jsonl"}},
    "reward": {"components": [{"function": "exact_match"}]},
    "train": {"steps": 1},
}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"critic": {"path": "c"}}, "critic.path=c: not read under critic.init=actor"),
        ({"reward": {"components": [{"function": "exact_match"}, {"function": "exact_match"}]}}, "two are called exact_match"),
        ({"reward": {**_RL["reward"], "missing_eos_penalty": 1.0}, "algorithm": {"truncation": "mask"}}, "no effect under algorithm.truncation=mask"),
        ({"reference": {"gradient_checkpointing": True}}, "unknown key `reference.gradient_checkpointing`"),
    ],
)
def test_what_would_be_ignored_is_refused(sections: dict[str, Any], message: str) -> None:
    parse_config(_RL)
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_config({**_RL, **sections})


def test_a_clip_in_the_json_does_not_refuse_the_frozen_models() -> None:
    json_file = {"gradient_clipping": 1.0, "zero_optimization": {"stage": 3}}
    config = parse_config({**_RL, "deepspeed": json_file, "algorithm": {"kl": {"coef": 0.1}}})
    assert role_settings(config, config.actor, world_size=1, on_gpu=False)["gradient_clipping"] == 1.0
    assert role_settings(config, config.reference, world_size=1, on_gpu=False)["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("architecture", "targets", "message"),
    [
        ("llama", ["lm_head"], "are one tied weight"),
        ("llama_untied", ["embed_tokens"], "is no linear layer"),
        ("llama", ["nothing"], "no module is called nothing"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(models: Path, architecture: str, targets: list[str], message: str) -> None:
    module = AutoModelForCausalLM.from_pretrained(models / architecture)
    with pytest.raises(ValueError, match=message) as caught:
        add_adapters(module, LoraConfig(target_modules=targets), 0)
    assert "lora.target_modules" in str(caught.value)


_PRINT_ROWS = """
import hashlib
from rlhf.config import SourceConfig
from rlhf.data import read_rows
rows = [row for task in ("list_functions", "isomorphic_strings") for _, row in read_rows(SourceConfig(task=task, size=4))]
print(hashlib.sha256(repr(rows).encode()).hexdigest())
"""


def test_tasks_give_every_process_the_same_rows() -> None:
    """As train_rlhf.py starts itself: with the hash seed fixed. list_functions draws from the global generator besides."""
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-c", _PRINT_ROWS]
    outputs = [subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout for _ in range(2)]
    assert outputs[0] == outputs[1]


def _read_differently(world: World) -> str:
    try:
        check_same_data(world, [[1, 2], [3 + world.rank]])
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_with_different_data_are_refused() -> None:
    assert all("rank 1 has read other data than rank 0" in message for message in run_ranks(_read_differently, 2))
    check_same_data(single_world(), [[1, 2], [3]])


def test_offload_goes_with_our_optimizer() -> None:
    block = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    config = parse_config({**_RL, "deepspeed": block})
    assert role_settings(config, config.actor, world_size=1, on_gpu=False)["zero_force_ds_cpu_optimizer"] is False
    assert "offload_optimizer" not in role_settings(config, config.reference, world_size=1, on_gpu=False)["zero_optimization"]


def test_an_unknown_best_metric_is_named() -> None:
    with pytest.raises(ValueError, match=r"validation.best_metric=accuracy: not measured; there are val-core/loss"):
        Best("accuracy", "max").check({"val-core/loss": 1.0})


def _rl(**changes: Any) -> dict[str, Any]:
    tree = {
        "task": "rl",
        "run_dir": "x",
        "actor": {"path": "m"},
        "data": {"train": {"path": "a.jsonl"}},
        "reward": {"components": {"function": "exact_match"}},
        "rollout": {"group_size": 2},
        "train": {"steps": 3},
    }
    return {**tree, **changes}


def test_trap_11_kl_in_the_reward_cannot_be_blown_up_by_a_groups_deviation() -> None:
    with pytest.raises(ValueError, match="group_scale=none"):
        parse_config(_rl(algorithm={"name": "grpo", "kl": {"coef": 0.1, "place": "reward", "estimator": "k1"}}))
    assert parse_config(_rl(algorithm={"name": "grpo", "kl": {"coef": 0.1}})).algorithm.kl.estimator == "k3_corrected"
    assert parse_config(_rl(algorithm={"name": "ppo", "kl": {"coef": 0.1}})).algorithm.kl.place == "reward"


def test_optimizer_numbers_of_the_json_are_the_recipes() -> None:
    def settings(params: dict[str, Any]) -> dict[str, Any]:
        config = parse_config(_rl(actor={"path": "m", "learning_rate": 1e-5}, deepspeed={"optimizer": {"type": "AdamW", "params": params}}))
        found: dict[str, Any] = role_settings(config, config.actor, world_size=1, on_gpu=False)["optimizer"]["params"]
        return found

    assert settings({"lr": "auto"}) == {"lr": 1e-5, "weight_decay": 0.0, "betas": [0.9, 0.999], "eps": 1e-8}
    with pytest.raises(ValueError, match=r"optimizer\.params\.lr"):
        settings({"lr": 1e-4})


def test_a_role_with_another_tokenizer_is_refused(tmp_path: Path, models: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(models / "llama", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    first, last = min(words, key=words.get), max(words, key=words.get)
    words[first], words[last] = words[last], words[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = parse_config(_rl(actor={"path": str(models / "llama")}, critic={"init": "path", "path": str(other)}))
    with pytest.raises(ValueError, match="critic: the tokenizer"):
        check(config, world_size=1, on_gpu=False)


def test_weights_that_do_not_fit_are_named_before_any_is_read(tmp_path: Path, models: Path) -> None:
    """Each by its key: a reward model without a head, a critic that is to keep one, a file that is missing, another shape."""
    incomplete, wide = (Path(shutil.copytree(models / "llama", tmp_path / name)) for name in ("incomplete", "wide"))
    tensors = load_file(models / "llama" / "model.safetensors")
    norm = next(name for name in tensors if name.endswith("norm.weight"))
    save_file({name: t for name, t in tensors.items() if "layers.1." not in name}, incomplete / "model.safetensors")
    save_file(tensors | {norm: torch.ones(5)}, wide / "model.safetensors")
    llama, cases = str(models / "llama"), []
    cases.append(
        (r"reward.components.0.model.path=.*llama: no score.weight in it", {"reward": {"components": [{"model": {"path": llama}, "name": "rm"}]}})
    )
    cases.append((r"critic.path=.*llama: no score.weight in it", {"critic": {"init": "path", "path": llama, "head": "keep"}}))
    cases.append(
        (r"actor.path=.*incomplete: the weights do not fit LlamaForCausalLM: missing \['model.layers.1", {"actor": {"path": str(incomplete)}})
    )
    cases.append((r"actor.path=.*wide: .*norm.weight has shape \(5,\), the model needs", {"actor": {"path": str(wide)}}))
    for said, sections in cases:
        with pytest.raises(ValueError, match=said):
            check(parse_config(_rl(actor=sections.pop("actor", {"path": llama}), **sections)), world_size=1, on_gpu=False)
    check(parse_config(_rl(actor={"path": llama})), world_size=1, on_gpu=False)


def test_an_attention_that_there_is_not_is_refused_by_its_key(models: Path) -> None:
    def asked(name: str, packing: bool) -> None:
        check(parse_config(_rl(actor={"path": str(models / "llama"), "attention": name}, train={"steps": 2, "packing": packing})), 1, False)

    asked("eager", False)
    with pytest.raises(ValueError, match=r"actor\.attention=flesh: "):
        asked("flesh", False)
    with pytest.raises(ValueError, match=r"actor\.attention=flash_attention_2: .*"):
        asked("flash_attention_2", False)
    with pytest.raises(ValueError, match=r"actor\.attention=eager: packed rows have an attention of their own"):
        asked("eager", True)


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ({"stage": 2, "overlap_com": True}, "`zero_optimization.overlap_com`: unknown key; did you mean `overlap_comm`?"),
        ({"stage": 2, "reduce_bucket_size": "many"}, "`zero_optimization.reduce_bucket_size` is 'many'; it takes a whole number"),
        ({"stage": 3, "offload_param": {"device": "gpu"}}, "`zero_optimization.offload_param.device` is 'gpu'; none or cpu"),
    ],
)
def test_what_deepspeed_would_refuse_with_models_loaded_is_refused_before(models: Path, tmp_path: Path, zero: dict[str, Any], said: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(ValueError, match=re.escape(f"{file}: {said}")):
        check(parse_config(_rl(actor={"path": str(models / "llama")}, deepspeed=str(file))), 1, False)


def test_the_keys_of_zero_optimization_are_deepspeeds() -> None:
    """Those that we know under another name aside; and each kind of value that it takes, we take."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = {entry.alias or field for field, entry in DeepSpeedZeroConfig.model_fields.items()}
    assert theirs - _RENAMED.keys() == _ZERO.keys()
    example: dict[type, Any] = {bool: True, int: 8, dict: {}}
    for key, kind in _ZERO.items():
        if key not in ("stage", "elastic_checkpoint"):
            DeepSpeedZeroConfig(**{key: example[kind]})


def test_a_kept_head_speaks_in_the_units_of_the_rewards(models: Path) -> None:
    body = AutoModel.from_pretrained(models / "llama")
    model = ScalarModel(body, body.config.hidden_size)
    ids = torch.arange(5)[None]
    raw = model(ids, ids)
    model.centre(2.0, 4.0)
    torch.testing.assert_close(model(ids, ids), (raw - 2.0) / 4.0)


def test_a_bfloat16_head_keeps_more_than_eight_bits(models: Path) -> None:
    body = AutoModel.from_pretrained(models / "llama", dtype=torch.bfloat16)
    model = ScalarModel(body, body.config.hidden_size)
    ids = torch.arange(12)[None]
    scores = model(ids, ids)
    assert scores.dtype == torch.float32 and bool((scores != scores.bfloat16().float()).any())


@pytest.mark.parametrize("operator", ["deepspeed_shm_comm", "fused_adam"])
@pytest.mark.parametrize("abandoned", [False, True])
def test_only_an_abandoned_lock_is_removed(abandoned: bool, operator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A builder that is done closes its lock file before it removes it, and another may take it at once."""
    lock = tmp_path / operator / "lock"
    lock.parent.mkdir()
    lock.touch()
    taken: list[Any] = []
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("rlhf.engine.time.sleep", lambda _: None if abandoned else taken.append(lock.open()))
    _clear_abandoned_builds()
    assert lock.exists() != abandoned
    for file in taken:
        file.close()
