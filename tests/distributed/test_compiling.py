"""Compiled layers under ZeRO-3: gathered weights are given back after the forward, and no rank compiles a layer for itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.config import LoraConfig, Recomputed, TrainedModelConfig
from rlhf.distributed import World
from rlhf.engine import TrainEngine, loading_context
from rlhf.models import compiling
from rlhf.models.checkpointing import decoder_layers, recompute
from rlhf.models.lora import add_adapters
from tests.distributed.test_engine import IDS, forward, settings
from tests.helpers import run_ranks


class _KeepsViews(torch.autograd.Function):
    """A linear as autograd itself would have it: what it keeps is a view of the gathered weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        turned = weight.t()
        ctx.save_for_backward(x, turned)
        return x @ turned

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, turned = ctx.saved_tensors
        return d_out @ turned.t(), d_out.flatten(0, -2).t() @ x.flatten(0, -2)


def engine_of(world: World, models: Path, layers: int, way: str, what: Recomputed, lora: bool, seen: list[StorageWeakRef]) -> TrainEngine:
    """way: compiled, or views. seen: where the gathered weights of every layer lay while it computed."""
    config = TrainedModelConfig(path=models / "llama", dtype="float32", lora=LoraConfig(r=4) if lora else None, gradient_checkpointing=what)
    resolved = settings(3, world, sgd=False)
    resolved["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    architecture = AutoConfig.from_pretrained(models / "llama")
    architecture.num_hidden_layers = layers
    module: nn.Module = loading_context(resolved, world).construct(lambda: AutoModelForCausalLM.from_config(architecture))
    if config.lora:
        module = add_adapters(module, config.lora, 0)
    if way == "compiled":
        compiling.compile_layers(module)
    for layer in decoder_layers(module):
        if way == "views":
            for part in layer.modules():
                if type(part) is nn.Linear:
                    part.forward = lambda x, part=part: _KeepsViews.apply(x, part.weight)
        plain = layer.forward

        def noting(*inputs: Any, layer: nn.Module = layer, plain: Any = plain, **options: Any) -> Any:
            seen.extend(StorageWeakRef(p.data.untyped_storage()) for p in layer.parameters() if p.data.numel())
            return plain(*inputs, **options)

        layer.forward = noting
    if way == "compiled":
        recompute(module, what, "actor")
    return TrainEngine(module, config, resolved, world, 10, 0, "actor")


def step(world: World, models: Path, layers: int, way: str, what: Recomputed, lora: bool, backend: str = "aot_eager") -> tuple[int, int, list[int]]:
    """(storages of gathered weights, how many live on after the forward, graphs after each of the forwards with a backward)."""
    compiling.BACKEND = backend
    counters.clear()  # of the process that this one was forked from
    seen: list[StorageWeakRef] = []
    engine = engine_of(world, models, layers, way, what, lora, seen)
    graphs, count, alive = [], 0, 0
    for end in (7, 6, 4):
        seen.clear()
        logits = forward(engine, IDS[2 * world.rank : 2 * world.rank + 2, :end])
        count, alive = len(seen), sum(not storage.expired() for storage in seen)
        engine.backward(logits.square().sum(), 1.0)
        graphs.append(counters["stats"]["unique_graphs"])
        engine.score(input_ids=IDS[:2], use_cache=False)
    engine.step()
    return count, alive, graphs


@pytest.mark.slow
@pytest.mark.parametrize(("what", "lora"), [("mlp", True), (False, False), (True, False)])
def test_weights_are_given_back_after_the_forward(models: Path, what: Recomputed, lora: bool) -> None:
    for count, alive, graphs in run_ranks(step, 2, models, 3, "compiled", what, lora):
        assert count >= 3 * 9 and alive == 0
        assert graphs == [1, 2, 2]  # with gradients; the other is without, first asked for after the first step


@pytest.mark.slow
@pytest.mark.parametrize("what", [False, "mlp"])
def test_inductor_keeps_no_weights_either(models: Path, what: Recomputed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes in forked ranks
    for count, alive, graphs in run_ranks(step, 2, models, 3, "compiled", what, False, "inductor"):
        assert count >= 3 * 9 and alive == 0
        assert graphs == [1, 2, 2]


def test_a_kept_view_would_be_seen(models: Path) -> None:
    for count, alive, _ in run_ranks(step, 2, models, 3, "views", False, False):
        assert alive >= 3 * 7 <= count


@pytest.mark.slow
def test_as_many_graphs_for_more_layers(models: Path) -> None:
    few, many = (run_ranks(step, 2, models, layers, "compiled", False, False) for layers in (2, 6))
    assert [graphs for *_, graphs in few] == [graphs for *_, graphs in many]
