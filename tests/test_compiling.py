"""Compiled decoder layers: the same loss and gradients, and one graph for all layers and lengths."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from rlhf.batching import pack
from rlhf.config import LoraConfig, Recomputed
from rlhf.models import compiling, packing
from rlhf.models.activations import count_kept, kept_attention
from rlhf.models.checkpointing import decoder_layers, recompute
from rlhf.models.compiling import check_compile, compile_layers
from rlhf.models.forward import inputs_of
from rlhf.models.fused import fuse
from rlhf.models.lora import adapters_off, add_adapters
from rlhf.models.packing import pack_attention
from rlhf.models.scoring_head import fuse_head
from rlhf.preflight import check
from rlhf.types import Packed
from tests.helpers import relative, rl_config
from tests.test_memory import FAMILIES, LENGTHS, adapted, blank, kept_bytes

MICRO_BATCHES = [[5, 9, 3], [4, 8, 2, 2, 7], [3, 20]]
SLOW = [(False, False, False), (True, False, True), (True, True, False), (True, "mlp", False), (False, "mlp", True)]
CASES = [(True, False, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


def in_one_product(q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float, window: int | None) -> Tensor:
    """As much a part of a graph as the kernel on a GPU is, and told what that is told: attention over the whole row, other sequences masked out."""
    row = torch.bucketize(torch.arange(len(q)), packed.boundaries[1:], right=True)
    same, place = row[:, None] == row, packed.positions
    mask = same & (place[:, None] >= place) & (place < packed.longest)
    if window is not None:
        mask = mask & (place > place[:, None] - window)
    heads = [t.transpose(0, 1)[None] for t in (q, k, v)]
    return torch.nn.functional.scaled_dot_product_attention(*heads, mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)


def model_of(family: str, layers: int, compiled: bool, packed: bool, what: Recomputed, lora: bool) -> Any:
    torch.manual_seed(3)
    config = copy.deepcopy(FAMILIES[family])
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * layers
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    fuse(AutoModelForCausalLM.from_config(config)) if compiled else fuse(model)  # another role's kernels stand in the family's module
    if packed:
        pack_attention(model)
    if lora:
        model = add_adapters(model, LoraConfig(r=4), 1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    if compiled:
        compile_layers(model)
    recompute(model, what, "actor")
    return model


def outcomes(model: Any, packed: bool, lora: bool) -> tuple[list[dict[str, Tensor]], list[int]]:
    """Of every micro-batch: losses and gradients; and the graphs there were after it."""
    found, graphs = [], []
    for lengths in MICRO_BATCHES:
        ids = torch.arange(len(lengths) * max(lengths)).view(len(lengths), -1) % 11
        inputs = inputs_of(ids, pack(lengths) if packed else None)
        model.eval()
        with torch.no_grad():
            scored = {"scored": model(**inputs).logits}
            if lora:
                with adapters_off(model):
                    scored["base"] = model(**inputs).logits
        model.train()
        model.zero_grad()
        loss = model(**inputs).logits.square().sum()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append({**scored, "loss": loss.detach(), **gradients})
        graphs.append(counters["stats"]["unique_graphs"])
    return found, graphs


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")


def distance(found: Tensor, expected: Tensor) -> float:
    return relative({"": found}, {"": expected})


def assert_same(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys() and len(ours) > 10
        assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize(("family", "lora"), [("gemma3_text", False), pytest.param("llama", True, marks=pytest.mark.slow)])
def test_what_is_planned_is_what_compiled_layers_keep(family: str, lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", compiling.APART)
    monkeypatch.setattr(packing, "_in_groups", lambda q, k, v, *rest: kept_attention(*(t.contiguous() for t in (q, k, v)))[0])
    kept = {}
    for what in (False, "mlp"):
        model = blank(family, torch.bfloat16, False, fused=False)
        pack_attention(model)
        whole = adapted(model, lora)
        fuse_head(model)
        compile_layers(whole)
        recompute(whole, what, "actor")
        kept[what] = kept_bytes(whole.train(), True, False, what)
    with torch.device("meta"):
        counted = count_kept(adapted(blank(family, torch.bfloat16, False, fused=False), lora), compiled=True)
    tokens, layers = sum(LENGTHS), 3
    head = (2 * 128 + 16) * (tokens - 1)
    assert tokens * (layers * counted.layer + counted.rest) + head == pytest.approx(kept[False], rel=0.05)
    assert tokens * (layers * (counted.layer - counted.mlp + counted.entering) + counted.rest) + head == pytest.approx(kept["mlp"], rel=0.05)
    assert counted.mlp > counted.layer / 4


@pytest.mark.parametrize(("packed", "what", "lora"), CASES)
def test_the_same_with_a_graph_for_all_layers_and_lengths(packed: bool, what: Recomputed, lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_in_groups", in_one_product)
    found, graphs = outcomes(model_of("qwen2", 5, True, packed, what, lora), packed, lora)
    # Without gradients and with them; with adapters also without those, and the first layer, whose input needs no gradient.
    assert graphs == [4 if lora else 2] * 3
    assert not counters["graph_break"]
    assert_same(found, outcomes(model_of("qwen2", 5, False, packed, what, lora), packed, lora)[0])


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen2"])
def test_other_families(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them with the attention that a CPU has, which breaks the graph."""
    if family != "llama":
        monkeypatch.setattr(packing, "_in_groups", in_one_product)
    found, graphs = outcomes(model_of(family, 3, True, True, False, False), True, False)
    assert graphs[0] == graphs[1] == graphs[2] and bool(counters["graph_break"]) == (family == "llama")
    assert_same(found, outcomes(model_of(family, 3, False, True, False, False), True, False)[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real backend; in half precision it rounds where the operations round, so that graphs with gradients score as those without."""
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    monkeypatch.setattr(packing, "_in_groups", in_one_product)
    plain, model = (model_of("qwen2", 3, compiled, True, False, False).to(dtype) for compiled in (False, True))
    found = outcomes(model, True, False)[0]
    if dtype == torch.float32:
        assert_same(found, outcomes(plain, True, False)[0])
        return
    inputs = inputs_of(torch.arange(27).view(3, 9) % 11, pack([5, 9, 3]))
    with_gradients = model(**inputs).logits.detach()
    with torch.no_grad():
        assert distance(model(**inputs).logits, with_gradients) < 1e-3
        assert distance(with_gradients, plain(**inputs).logits) < 1e-2


def test_recomputed_layers_keep_their_input_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_in_groups", in_one_product)
    kept = {}
    for what in (False, "mlp", True):
        model, sizes = model_of("llama", 4, True, True, what, False), []
        weights = {p.data_ptr() for p in model.parameters()}

        def note(t: Tensor, weights: set[int] = weights, sizes: list[int] = sizes) -> Tensor:
            sizes.append(0 if t.data_ptr() in weights else t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            model.train()(**inputs_of(torch.arange(27).view(3, 9) % 11, pack([5, 9, 3])))
        kept[what] = sum(sizes)
    assert kept[True] < kept["mlp"] < kept[False]


def test_what_cannot_be_compiled_is_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "")
    check(rl_config(models, critic={"compile": True}), 1, False)
    model: Any = model_of("llama", 1, False, False, False, False)
    model._no_split_modules = model.model._no_split_modules = None
    check_compile(model, "critic", 2, False)
    with pytest.raises(ValueError, match=r"critic\.compile=true: LlamaDecoderLayer is not among .*zero2\.json"):
        check_compile(model, "critic", 3, False)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    for on_gpu in (False, True):
        with pytest.raises(ValueError, match=r"actor\.compile=true: torch\.compile needs .*set compile=false"):
            check(rl_config(models, actor={"compile": True}), 1, on_gpu)


def test_layers_are_there() -> None:
    """A copy of a compiled model computes with its own weights."""
    model = model_of("llama", 2, True, False, False, False)
    inputs = inputs_of(torch.arange(8).view(2, 4), None)
    expected = model(**inputs).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in decoder_layers(twin).parameters():
            parameter.zero_()
    assert distance(twin(**inputs).logits, expected) > 0.1
    assert torch.equal(model(**inputs).logits, expected)
