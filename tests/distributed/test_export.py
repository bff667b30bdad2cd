"""A checkpoint, whatever wrote it, as a folder that transformers and peft load: the same logits and values as the model that was trained."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.checkpoint import Mark
from rlhf.distributed import World
from rlhf.models.lora import as_peft
from rlhf.rewards.pool import Pool
from rlhf.trainers.rl import build_models
from rlhf.trainers.run import Best, start_run
from scripts import export
from tests.distributed.test_engine import IDS, forward, positions, train
from tests.helpers import relative, rl_config, run_ranks, tiny_tokenizer


def write(world: World, models: Path, run_dir: Path, stage: int, lora: bool, dtype: str) -> dict[str, Tensor]:
    """Two steps, a checkpoint with hf/, and one as a signal leaves it, without."""
    adapters = {"lora": {"r": 4}} if lora else {}
    role = {"dtype": dtype, "learning_rate": 0.05, **adapters}
    config = rl_config(
        models,
        stage,
        sgd=False,
        run_dir=run_dir,
        train={"packing": False},
        actor=role,
        critic={**role, "init": "path", "path": models / "scalar", "head": "keep"},
    )
    run = start_run(config, world, tiny_tokenizer(), "never", 9, Best("", "max"), ExitStack())
    held = build_models(run, 0, Pool([]))
    assert held.critic is not None
    run.resume(dict(held.engines), 9)
    train(held.actor, world, 2)
    for row in IDS[world.rank :: world.size]:
        held.critic.backward(held.critic(input_ids=row[None], position_ids=positions(row[None])).square().sum(), 40)
    held.critic.step()
    run.end_step(2, {}, held.engines, {}, "actor", save=True)
    run._save(Mark(2, 1), {}, held.engines)
    for engine in held.engines.values():
        as_peft(engine.module)
    return {"actor": forward(held.actor.score), "critic": held.critic.score(input_ids=IDS, position_ids=positions(IDS))}


def exported(run_dir: Path, out: Path, *arguments: str, name: str = "checkpoint-2+1") -> Path:
    assert export.main([str(run_dir / "checkpoints" / name), str(out), *arguments]) == 0
    return out


@torch.no_grad()
def values(folder: Path) -> Tensor:
    return values_of(AutoModelForSequenceClassification.from_pretrained(folder).eval())


def values_of(model: Any) -> Tensor:
    """As transformers computes them, of every token."""
    scores: Tensor = model.score(model.model(IDS).last_hidden_state).squeeze(-1)
    return scores


Written = tuple[Path, dict[str, Tensor]]


def ground(models: Path, folder: Path, stage: int, lora: bool, dtype: str = "float32") -> Written:
    return folder / "run", run_ranks(write, 2, models, folder / "run", stage, lora, dtype)[0]


@pytest.fixture(scope="module")
def full(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return ground(models, tmp_path_factory.mktemp("full"), 3, False)


@pytest.fixture(scope="module")
def lora(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return ground(models, tmp_path_factory.mktemp("lora"), 2, True)


def assert_like_hf(run_dir: Path, out: Path, *arguments: str) -> None:
    """Bit for bit what the run itself has written beside its states."""
    checkpoint = run_dir / "checkpoints" / "checkpoint-2"
    for name in ("hf/model", "adapter/adapter_model") if (checkpoint / "adapter").exists() else ("hf/model",):
        more = ["--adapter"] * name.startswith("adapter")
        folder = exported(run_dir, out / name, *arguments, *more, name="checkpoint-2")
        written = load_file(folder / f"{Path(name).name}.safetensors")
        kept = load_file(checkpoint / f"{name}.safetensors")
        assert written.keys() == kept.keys() and all(written[n].dtype == kept[n].dtype and torch.equal(written[n], kept[n]) for n in kept)


def test_all_weights_of_zero_3(full: Written, models: Path, tmp_path: Path) -> None:
    run_dir, trained = full
    assert not (run_dir / "checkpoints" / "checkpoint-2+1" / "hf").exists()
    model = AutoModelForCausalLM.from_pretrained(exported(run_dir, tmp_path / "actor")).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(forward(model), trained["actor"])
        assert (forward(AutoModelForCausalLM.from_pretrained(models / "llama").eval()) - trained["actor"]).abs().max() > 0.05
    assert torch.equal(values(exported(run_dir, tmp_path / "critic", "--model", "critic")), trained["critic"])
    assert (values(models / "scalar") - trained["critic"]).abs().max() > 0.05
    assert_like_hf(run_dir, tmp_path)


@torch.no_grad()
def test_adapters_of_zero_2(lora: Written, models: Path, tmp_path: Path) -> None:
    run_dir, trained = lora
    model = AutoModelForCausalLM.from_pretrained(exported(run_dir, tmp_path / "actor")).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert relative({"": forward(model)}, {"": trained["actor"]}) < 1e-6
    assert relative({"": values(exported(run_dir, tmp_path / "critic", "--model", "critic"))}, {"": trained["critic"]}) < 1e-6
    base = AutoModelForCausalLM.from_pretrained(models / "llama").eval()
    assert relative({"": forward(base)}, {"": trained["actor"]}) > 0.01
    adapted = PeftModel.from_pretrained(base, exported(run_dir, tmp_path / "adapter", "--adapter")).eval()
    assert torch.equal(forward(adapted), trained["actor"])
    scalar = AutoModelForSequenceClassification.from_pretrained(models / "scalar")
    adapted = PeftModel.from_pretrained(scalar, exported(run_dir, tmp_path / "head", "--model", "critic", "--adapter")).eval()
    assert torch.equal(values_of(adapted.base_model.model), trained["critic"])
    assert_like_hf(run_dir, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "lora"), [(3, True), (2, False), (1, True), (0, True)])
def test_bf16_is_what_a_gpu_would_have_written(models: Path, tmp_path: Path, stage: int, lora: bool) -> None:
    run_dir, _ = ground(models, tmp_path, stage, lora, "bfloat16" if stage else "float32")
    assert_like_hf(run_dir, tmp_path, "--dtype", "bf16" if stage else "fp32")


def test_what_cannot_be_exported(full: Written, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = shutil.copytree(full[0], tmp_path / "run", symlinks=True)
    latest, out = run_dir / "checkpoints" / "latest", tmp_path / "out"
    assert latest.resolve().name == "checkpoint-2+1"
    moved = tmp_path / "moved.json"

    def refused(*arguments: Any) -> str:
        assert export.main([str(argument) for argument in arguments]) == 2
        assert not out.exists() and not list(tmp_path.glob(".out*"))
        return capsys.readouterr().err

    assert f"{run_dir}: no readable manifest.json" in refused(run_dir, out)
    assert f"{models}: is there already" in refused(latest, models)
    assert "--model reward_model: " in refused(latest, out, "--model", "reward_model")
    assert "--adapter: actor was trained without LoRA" in refused(latest, out, "--adapter")
    assert f"actor.path={moved}: no such model folder" in (said := refused(latest, out, "--base", moved)) and "give it as --base" in said
    victim = sorted((run_dir / "checkpoints" / "checkpoint-2+1" / "critic").glob("rank-*.safetensors"))[1]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    assert f"checkpoint-2+1: critic/{victim.name} is damaged; name another checkpoint" in refused(latest, out)
