"""The probe before the first step: ranks agree on a budget, and training knows nothing of it."""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Phi3Config

import rlhf.trainers.run as run_module
from rlhf.batching import pack
from rlhf.config import Config
from rlhf.distributed import World
from rlhf.memory import GIB, lends_weights
from rlhf.models.forward import inputs_of
from rlhf.models.scoring_head import logprobs_of
from rlhf.trainers.probe import fit_budget, fits
from rlhf.trainers.rl import probes
from rlhf.trainers.run import Best, start_run
from tests.distributed.steps import experience_of, open_models, update, weights
from tests.helpers import make_rollout, make_scores, rl_config, run_ranks, tiny_tokenizer


def _agree(world: World, models: str, fails: dict[int, int], key: dict[str, int]) -> tuple[Any, list[int], Any]:
    """(the budget, what was tried, budget.json) where rank r runs out of memory above fails[r]."""
    folder = Path(world.broadcast_object(tempfile.mkdtemp()))
    config = rl_config(Path(models), train=key).model_copy(update={"run_dir": folder})
    run = start_run(config, world, tiny_tokenizer(), "never", 1, Best("", "max"), ExitStack())
    run.expect(64)
    tried: list[int] = []

    def loss(module: Any, lengths: list[int], config: Config) -> Tensor:
        tried.append(sum(lengths))
        if sum(lengths) > fails.get(world.rank, 10**9):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate everything")
        ids = torch.zeros(1, 8, dtype=torch.int64)
        return logprobs_of(module, inputs_of(ids, pack([8])), torch.arange(7), ids[:, 1:], 1.0)[0].sum()

    fit_budget(run, {"actor": loss})
    world.barrier()
    file = folder / "budget.json"
    return run.config.train, tried, json.loads(file.read_text()) if file.is_file() else None


def test_all_ranks_agree(models: Path) -> None:
    for train, tried, written in run_ranks(_agree, 2, str(models), {1: 1100}, {"micro_batch_tokens": 2048}):
        assert train.micro_batch_tokens == 1024 and tried == [2048, 1536, 1024] and written == {"train.micro_batch_tokens": 1024}
    for train, tried, written in run_ranks(_agree, 2, str(models), {0: 200}, {"micro_batch": 8}):
        assert train.micro_batch == 2 and tried == [512, 256, 128] and written == {"train.micro_batch": 2}
    for train, _, written in run_ranks(_agree, 2, str(models), {}, {"micro_batch": 8}):
        assert train.micro_batch == 8 and written is None
    for train, tried, written in run_ranks(_agree, 2, str(models), {0: 10}, {"micro_batch": 8}):  # nothing smaller is left: on it goes
        assert train.micro_batch == 1 and tried == [512, 256, 128, 64, 64] and written == {"train.micro_batch": 1, "rollout.release": True}


def _too_long(world: World, models: str) -> list[str]:
    """What the run says of rows of 64 and 65 tokens, trained on or held out."""
    folder = Path(world.broadcast_object(tempfile.mkdtemp()))
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.1] * 48, "long_factor": [3.0] * 48}
    Phi3Config(original_max_position_embeddings=64, rope_parameters=rope, pad_token_id=0).save_pretrained(folder / "phi3")
    (folder / "phi3" / "model.safetensors").touch()
    config = rl_config(Path(models), algorithm={"kl": {"coef": 0.1}}, reference={"path": folder / "phi3"}).model_copy(update={"run_dir": folder})
    run = start_run(config, world, tiny_tokenizer(), "never", 1, Best("", "max"), ExitStack())
    said = []
    for lengths in ((64, 64), (65, 0), (3, 65)):
        try:
            run.expect(*lengths)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def test_rows_that_any_role_would_compute_wrongly_are_refused_before_it_loads(models: Path) -> None:
    (said,) = run_ranks(_too_long, 1, str(models))
    assert said[0] == "" and said[1] == said[2]
    assert said[1].startswith("reference: 'longrope' rotary scaling") and "the longest row has 65: lower data.max_prompt_tokens or" in said[1]


def _chosen(world: World, models: str, room: dict[int, float]) -> tuple[Any, list[int], Any]:
    """As `_agree`, where the recipe says `auto`, devices are of room[r] GiB, and 600 tokens are too many for rank 1."""
    folder = Path(world.broadcast_object(tempfile.mkdtemp()))
    run_module.device_capacity = lambda: int(room[world.rank] * GIB)
    trained = {"gradient_checkpointing": "auto"}
    settings = {
        "data": {"train": [{"path": "none.jsonl"}]},
        "rollout": {"prompts": 32, "max_new_tokens": 64},
        "train": {"micro_batch_tokens": "auto"},
    }
    config = rl_config(Path(models), actor=trained, critic=trained, **settings).model_copy(update={"run_dir": folder})
    run = start_run(config, world, tiny_tokenizer(), "never", 1, Best("", "max"), ExitStack())
    run.expect(64)
    tried: list[int] = []

    def loss(module: Any, lengths: list[int], config: Config) -> Tensor:
        tried.append(sum(lengths))
        if world.rank and sum(lengths) > 600:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate everything")
        return next(module.parameters()).sum()

    fit_budget(run, {"actor": loss})
    world.barrier()
    return run.config, tried, json.loads((folder / "budget.json").read_text())


def test_ranks_choose_for_the_smallest_and_shrink_what_was_chosen(models: Path) -> None:
    for room, checkpointing in (({0: 80.0, 1: 80.0}, False), ({0: 80.0, 1: 1.0}, True)):
        for config, tried, written in run_ranks(_chosen, 2, str(models), room):
            most = 1024 if checkpointing is False else 256  # 16 rows of 64 tokens on a rank; nothing fits beside CUDA and NCCL in 1 GiB
            assert tried == [most, 768, 512][: 3 if most == 1024 else 1]
            assert config.actor.recomputed is config.critic.recomputed is checkpointing
            keys = {f"{name}.gradient_checkpointing": checkpointing for name in ("actor", "critic")}
            assert written["chosen"] == {"train.micro_batch_tokens": most, **keys}
            assert config.train.forward_tokens == tried[-1] == written.get("train.micro_batch_tokens", most)


def _unlike(world: World, models: str) -> tuple[Any, ...]:
    """What the ranks go on with where the device of rank 1, and only that, is so small that the plan bounds the KV cache, and it has no room once."""
    folder = Path(world.broadcast_object(tempfile.mkdtemp()))
    run_module.device_capacity = lambda: int((80, 2.6)[world.rank] * GIB)
    sections = {"rollout": {"prompts": 32, "max_new_tokens": 64, "max_batch": 31_250, "memory_fraction": 0.95}, "train": {"micro_batch_tokens": 2048}}
    half = {name: {"dtype": "bfloat16"} for name in ("actor", "critic", "reference")}
    config = rl_config(Path(models), 3, sgd=False, **sections, **half).model_copy(update={"run_dir": folder})
    run = start_run(config, world, tiny_tokenizer(), "never", 1, Best("", "max"), ExitStack())
    run.expect(128)
    bounded, tried = run.plan.cache, 0

    def loss(module: Any, lengths: list[int], config: Config) -> Tensor:
        nonlocal tried
        tried += 1
        if world.rank and tried == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate everything")
        return next(module.parameters()).sum()

    fit_budget(run, {"actor": loss})
    return bounded, run.config.rollout.release, run.config.train.micro_batch_tokens, lends_weights(run.config, 2, True)


def test_ranks_on_unlike_devices_plan_alike(models: Path) -> None:
    """Which of the two is given up decides who gathers what, and how many forwards there are: ranks that differ in it would wait for each other."""
    first, second = run_ranks(_unlike, 2, str(models))
    assert first == second and first[0] is not None
    assert first[1:] == (True, 2048, False)


def _broken(world: World, models: str) -> bool:
    run = start_run(
        rl_config(Path(models)).model_copy(update={"run_dir": Path(tempfile.mkdtemp())}),
        world,
        tiny_tokenizer(),
        "never",
        1,
        Best("", "max"),
        ExitStack(),
    )

    def loss(*_: Any) -> Tensor:
        raise TypeError("an architecture like no other")

    return fits(run, "actor", loss)


def test_a_stand_in_that_cannot_be_made_stops_nobody(models: Path) -> None:
    assert run_ranks(_broken, 1, str(models)) == [True]


def _update(world: World, models: str, probe: bool) -> Any:
    """Weights after an update, with the probe before it or without."""
    losses, run = open_models(rl_config(Path(models), 3 if world.size > 1 else 0, train={"micro_batch": 4}), world)
    if probe:
        run.expect(40)
        assert fits(run, "actor", probes(losses)["actor"]) and fits(run, "critic", probes(losses)["critic"])
    rollout = make_rollout([3, 4], [5, 2], 6)
    update(losses, run, experience_of(losses, run, rollout, make_scores([1.0, -1.0])))
    return [weights(engine) for engine in losses.engines.values()]


def test_training_is_the_same_bits_with_the_probe(models: Path) -> None:
    with_probe, without = run_ranks(_update, 2, str(models), True)[0], run_ranks(_update, 2, str(models), False)[0]
    for a, b in zip(with_probe, without, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)
