"""The fused norm, gated MLP and rotary embedding against transformers' own. Kernels run in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlhf.batching import pack
from rlhf.config import LoraConfig
from rlhf.models.checkpointing import recompute
from rlhf.models.forward import inputs_of
from rlhf.models.fused import fuse
from rlhf.models.heads import ScalarModel
from rlhf.models.lora import add_adapters
from rlhf.models.packing import pack_attention
from rlhf.ops import fused
from rlhf.ops.fused import gated, gated_down, gated_gradient, linear, rms_norm, rotate, silu_mul_pair
from rlhf.rollout import kernels
from tests.helpers import relative
from tests.interpreter import interpreted

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HALF = torch.bfloat16 if ON_GPU else torch.float16  # the interpreter cuts bfloat16 off instead of rounding it
in_kernels = pytest.mark.gpu if ON_GPU else pytest.mark.timeout(120)
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="no GPU")]

SMALL: dict[str, Any] = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6}
SMALL |= {"num_key_value_heads": 2, "initializer_range": 0.2}
FAMILIES: dict[str, tuple[PretrainedConfig, int]] = {  # and how many modules are replaced
    "llama": (LlamaConfig(**SMALL, mlp_bias=True), 7),
    "qwen2": (Qwen2Config(**SMALL), 7),
    "qwen3": (Qwen3Config(**SMALL, head_dim=16), 11),
    "mistral": (MistralConfig(**SMALL, sliding_window=6), 7),
}
IDS = torch.randint(97, (2, 13), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """`fuse` replaces a function of transformers' modules: every test begins with the original, and leaves what it found."""
    modules = [importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in FAMILIES]
    before = [module.apply_rotary_pos_emb for module in modules]
    for module, function in zip(modules, before, strict=True):
        module.apply_rotary_pos_emb = inspect.unwrap(function)  # another file's tests may have replaced it
    yield
    for module, function in zip(modules, before, strict=True):
        module.apply_rotary_pos_emb = function


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Kernels compute whatever they are given; how often each was asked."""
    interpreted()
    monkeypatch.setattr(fused, "_in_kernels", lambda *tensors: True)
    calls: Counter[str] = Counter()

    def count(owner: type) -> None:
        original: Callable[..., Any] = owner.forward  # type: ignore[attr-defined]

        def counted(*args: Any) -> Any:
            calls[owner.__name__] += 1
            return original(*args)

        monkeypatch.setattr(owner, "forward", staticmethod(counted))

    for owner in (fused._RmsNorm, fused._SiluMul, fused._GatedDown, fused._Rotate):
        count(owner)
    return calls


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def build(config: PretrainedConfig, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # not all ones, not all zero
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def outcome(model: nn.Module, ids: Tensor = IDS) -> dict[str, Tensor]:
    """Logits and every gradient."""
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    (logits.float() * torch.linspace(-1, 1, logits.shape[-1], device=logits.device)).square().mean().backward()
    return {"logits": logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --------------------------------------------------------------------------------------------------------------------------
# Plain paths: today's bits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_on_cpu_nothing_changes(family: str, dtype: torch.dtype, attention: str) -> None:
    config, modules = FAMILIES[family]
    model = build(config, dtype, attention)
    before, state = outcome(model), set(model.state_dict())
    assert fuse(model) == modules
    same(outcome(model), before)
    assert set(model.state_dict()) == state
    model.gradient_checkpointing_enable({"use_reentrant": False})
    same(outcome(model.train()), before)


def test_the_plain_functions_are_those_of_transformers() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 5, 48, dtype=dtype)
        norm = LlamaRMSNorm(48, 1e-5).to(dtype)
        nn.init.normal_(norm.weight)
        assert torch.equal(rms_norm(x, norm.weight, 1e-5), norm(x))
        gate, up = torch.randn(2, 4, 33, dtype=dtype)
        assert torch.equal(silu_mul_pair(gate, up), nn.functional.silu(gate) * up)
        q, k, cos, sin = (torch.randn(*shape, dtype=dtype) for shape in ((2, 4, 5, 8), (2, 2, 5, 8), (1, 5, 8), (1, 5, 8)))
        for ours, theirs in zip(rotate(q, k, cos, sin), modeling_llama.apply_rotary_pos_emb(q, k, cos, sin), strict=True):
            assert torch.equal(ours, theirs)


def test_fusing_twice_is_fusing_once() -> None:
    model = build(FAMILIES["llama"][0])
    original = modeling_llama.apply_rotary_pos_emb
    assert fuse(model) == 7
    replaced = modeling_llama.apply_rotary_pos_emb
    assert replaced is not original and inspect.signature(replaced) == inspect.signature(original)
    forwards = [m.forward for m in model.modules()]
    assert fuse(model) == 0 and fuse(build(FAMILIES["llama"][0])) == 7
    assert modeling_llama.apply_rotary_pos_emb is replaced and [m.forward for m in model.modules()] == forwards


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4),
        GemmaConfig(**SMALL, head_dim=16),
        LlamaConfig(**SMALL, hidden_act="gelu"),
    ],
)
def test_others_are_left_alone(config: PretrainedConfig) -> None:
    model, rotary = build(config), modeling_llama.apply_rotary_pos_emb
    assert fuse(model) == 0 and not any("forward" in vars(m) for m in model.modules())
    assert modeling_llama.apply_rotary_pos_emb is rotary


def test_a_foreign_forward_stays() -> None:
    """Somebody else's replacement of a module's forward is not undone."""
    model = build(FAMILIES["llama"][0])
    model.model.norm.forward = mine = lambda x: x  # type: ignore[union-attr]
    assert fuse(model) == 6 and model.model.norm.forward is mine  # type: ignore[union-attr]


def test_wrappers_adapters_copies_and_pickles() -> None:
    config, modules = FAMILIES["qwen2"]
    scalar = ScalarModel(build(config).model, config.hidden_size)  # type: ignore[arg-type]
    assert fuse(scalar) == modules
    model = build(config)
    assert fuse(model) == modules
    before = outcome(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    same(outcome(twin), before)  # its forwards belong to it
    same(outcome(pickle.loads(pickle.dumps(twin))), before)
    plain, adapted = (add_adapters(build(config), LoraConfig(r=2), 3) for _ in range(2))
    for wrapped in (plain, adapted):
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    expected = outcome(plain)
    assert fuse(adapted) == modules and any("gate_proj.lora_A" in name for name in expected)
    same(outcome(adapted), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (1, 0, 6)])
def test_linear(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], bias: bool) -> None:
    """As on a GPU: torch's values and gradients, and none for what is frozen."""
    monkeypatch.setattr(fused, "_in_kernels", lambda *tensors: True)
    x, weight, b = (values(*s, dtype=torch.float64, seed=i).requires_grad_() for i, s in enumerate([shape, (4, 6), (4,)]))
    given = [x, weight] + [b] * bias
    out, expected = (f(x, weight, b if bias else None) for f in (linear, nn.functional.linear))
    assert type(out.grad_fn).__name__ == "_LinearBackward" and out.shape == expected.shape
    for ours, theirs in zip((out, *gradients(out, *given)), (expected, *gradients(expected, *given)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    frozen = linear(x, weight.detach(), b.detach() if bias else None)
    assert frozen.grad_fn is not None and frozen.grad_fn.apply(torch.ones_like(frozen))[1:] == (None, None)  # type: ignore[operator]
    assert linear(x.detach(), weight.detach(), None).grad_fn is None


def with_adapters(model: nn.Module) -> nn.Module:
    """Whose adapters do something, and not so much that a rounding error in one layer is a hundred in the next; the same ones for the same shapes."""
    wrapped = add_adapters(model, LoraConfig(r=4), 3)
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            draw = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            parameter.data.copy_(draw * 0.25 * parameter.shape[1] ** -0.5)
    return wrapped


# --------------------------------------------------------------------------------------------------------------------------
# Kernels


def gradients(out: Tensor | tuple[Tensor, ...], *inputs: Tensor, seed: int = 9) -> tuple[Tensor, ...]:
    outs = (out,) if isinstance(out, Tensor) else out
    return torch.autograd.grad(outs, inputs, [values(*o.shape[::-1], dtype=o.dtype, seed=seed).permute(*range(o.dim())[::-1]) for o in outs])


def check(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """theirs: from the same numbers in float64 or float32."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        tolerance = 1e-5 if dtype == torch.float32 else 0.01
        torch.testing.assert_close(a.double(), b.double(), atol=tolerance * float(b.abs().max()), rtol=tolerance)


@in_kernels
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("shape", [(5, 96), (2, 7, 33), (300, 100), (1, 3, 1500), (2, 9, 3, 24), (2, 3, 2, 25), (1, 2, 2, 600), (2, 2100)])
def test_norm(forced: Counter[str], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """(300, 100): programs of the backward go round more than once, and the last has rows to spare. Four dimensions are heads."""
    x, weight = values(*shape[::-1], dtype=dtype).permute(*range(len(shape))[::-1]).requires_grad_(), values(shape[-1], dtype=dtype, seed=1)
    assert not x.is_contiguous()
    weight.requires_grad_()
    out = rms_norm(x, weight, 1e-5)
    assert forced["_RmsNorm"] == 1 and out.shape == x.shape and out.is_contiguous()
    wide_x, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    scaled = wide_x * torch.rsqrt(wide_x.square().mean(-1, keepdim=True) + 1e-5)
    check((out,), (scaled * wide_weight,), dtype)
    if len(shape) < 4:
        rows = x.detach().reshape(-1, shape[-1]).contiguous()
        assert torch.equal(out.flatten(0, -2), kernels.add_norm(rows, None, weight.detach(), 1e-5))
    found = gradients(out, x, weight)
    check(found, gradients((scaled * wide_weight).to(dtype), wide_x, wide_weight), dtype)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(rms_norm(x, weight, 1e-5), x, weight), strict=True))


@in_kernels
def test_norm_of_a_frozen_weight(forced: Counter[str]) -> None:
    weight, x = values(40, seed=1), values(6, 40).requires_grad_()
    out = rms_norm(x, weight, 1e-5)
    assert out.grad_fn.apply(values(6, 40))[1] is None  # type: ignore[union-attr]
    (alone,) = gradients(rms_norm(x, weight, 1e-5), x)
    both = gradients(rms_norm(x, weight.requires_grad_(), 1e-5), x, weight)
    assert torch.equal(alone, both[0])
    rms_norm(x.detach(), weight, 1e-5).sum().backward()
    assert weight.grad is not None


@in_kernels
def test_norm_rounds_as_transformers(forced: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The quotient first: a norm that rounds only its result differs in every fourth element. Sums are in another order: all but a few are equal."""
    x, weight = values(64, 256, dtype=HALF), values(256, dtype=HALF, seed=1)
    out = rms_norm(x, weight, 1e-6)
    heads = rms_norm(x.view(8, 8, 2, 128), weight[:128], 1e-6)
    assert forced["_RmsNorm"] == 2
    monkeypatch.setattr(fused, "_in_kernels", lambda *tensors: False)
    for ours, theirs in ((out, rms_norm(x, weight, 1e-6)), (heads, rms_norm(x.view(8, 8, 2, 128), weight[:128], 1e-6))):
        assert float((ours != theirs).float().mean()) < 0.01


@in_kernels
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("shape", [(3, 1500), (2, 5, 33), (1, 4, 1024)])
def test_gated_activation(forced: Counter[str], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate_up = values(*shape[:-1], 2 * shape[-1], dtype=dtype) * 3
    gate, up = (t.detach().requires_grad_() for t in gate_up.chunk(2, -1))
    assert not gate.is_contiguous()
    out = silu_mul_pair(gate, up)
    assert forced["_SiluMul"] == 1 and out.shape == shape
    rows = gate_up.flatten(0, -2)
    assert torch.equal(out.flatten(0, -2), kernels.silu_mul(rows, len(rows)))
    wide_gate, wide_up = gate.detach().double().requires_grad_(), up.detach().double().requires_grad_()
    wide = nn.functional.silu(wide_gate) * wide_up
    check((out,), (wide,), dtype)
    check(gradients(out, gate, up), gradients(wide.to(dtype), wide_gate, wide_up), dtype)
    far = torch.tensor([[-1e4, -80.0, 80.0, 1e4]], device=DEVICE).requires_grad_()
    (slope,) = torch.autograd.grad(silu_mul_pair(far, torch.ones_like(far)).sum(), far)
    torch.testing.assert_close(slope, torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=DEVICE))


@in_kernels
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_gated_down_keeps_only_its_inputs(forced: Counter[str], dtype: torch.dtype, frozen: bool) -> None:
    gate, up = (values(2, 7, 130, dtype=dtype, seed=seed).requires_grad_() for seed in (0, 1))
    weight = (values(24, 130, dtype=dtype, seed=2) * 0.1).requires_grad_(not frozen)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        out = gated_down(gate, up, weight)
    assert {t.data_ptr() for t in kept} == {gate.data_ptr(), up.data_ptr(), weight.data_ptr()}
    given = [gate, up] if frozen else [gate, up, weight]
    twins = [t.detach().clone().requires_grad_(t.requires_grad) for t in (gate, up, weight)]
    inner = silu_mul_pair(twins[0], twins[1]).flatten(0, -2)  # with a frozen weight a product of batches would be another kernel
    apart = nn.functional.linear(inner, twins[2]).view_as(out)
    assert forced == {"_GatedDown": 1, "_SiluMul": 1} and torch.equal(out, apart)
    for one, other in zip(gradients(out, *given), gradients(apart, *twins[: len(given)]), strict=True):
        assert torch.equal(one, other)


@in_kernels
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_gate_and_up_side_by_side(forced: Counter[str], dtype: torch.dtype) -> None:
    """One tensor for both, as adapted MLPs have it: bit for bit two of them."""
    gate, up, d_out = (values(5, 1100, dtype=dtype, seed=seed) for seed in range(3))
    both = torch.cat((gate, up), 1)
    gate, up = gate.requires_grad_(), up.requires_grad_()
    out = silu_mul_pair(gate, up)
    expected = torch.cat(torch.autograd.grad(out, (gate, up), d_out), 1)
    d_both = gated_gradient(both, d_out)
    assert forced["_SiluMul"] == 1 and torch.equal(gated(both), out)
    assert torch.equal(d_both, expected) and torch.equal(d_out, out)


@in_kernels
def test_adapted_layers(forced: Counter[str]) -> None:
    """A decoder layer's projections and MLP under LoRA, in kernels and half precision: as near float64 as peft's own forward is."""
    found = []
    for kind in ("truth", "theirs", "ours"):
        model = build(FAMILIES["qwen2"][0])
        if kind == "ours":
            fuse(model)
        model = with_adapters(model).to(DEVICE, torch.float64 if kind == "truth" else HALF)
        if kind != "ours":
            for part in model.modules():
                vars(part).pop("forward", None)
        layer: Any = model.get_submodule("base_model.model.model.layers.0")
        x = values(2, 9, 48, dtype=next(model.parameters()).dtype).requires_grad_()
        outs = [layer.mlp(x), *(getattr(layer.self_attn, f"{n}_proj")(x) for n in "qkv")]
        sum((out * values(*out.shape, dtype=out.dtype, seed=5)).sum() for out in outs).backward()  # type: ignore[union-attr]
        assert x.grad is not None
        tensors = {"x": x.grad, **{str(i): out.detach() for i, out in enumerate(outs)}}
        found.append(tensors | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert forced["_SiluMul"] == forced["_GatedDown"] == 0 and type(outs[0].grad_fn).__name__ == "_LoraMlpBackward"
    assert found[0].keys() == found[2].keys() and len(found[0]) == 5 + 2 * 6
    for name, value in found[0].items():
        theirs, ours = (float((f[name].double() - value).norm() / value.norm()) for f in found[1:])
        assert ours < 1.3 * theirs + 1e-3, (name, ours, theirs)


@in_kernels
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("dim", "heads", "kv_heads"), [(16, 6, 2), (24, 3, 1), (64, 14, 2), (10, 1, 1)])
@pytest.mark.parametrize("layout", ["model", "contiguous", "sliced"])
@pytest.mark.parametrize("rows", [1, 3])
def test_rotation(forced: Counter[str], dim: int, heads: int, kv_heads: int, layout: str, rows: int, dtype: torch.dtype) -> None:
    """Bit for bit transformers' operations, and autograd's on them, from any strides; q, k and their gradients lie as attention wants them."""
    batch, length = 3, 7
    if layout == "model":
        q, k = (values(batch, length, n, dim, dtype=dtype, seed=n).transpose(1, 2) for n in (heads, kv_heads))
    elif layout == "contiguous":
        q, k = (values(batch, n, length, dim, dtype=dtype, seed=n) for n in (heads, kv_heads))
    else:
        qkv = values(batch, length, heads + 2 * kv_heads, 2 * dim, dtype=dtype)
        q, k = qkv[:, :, :heads, ::2].transpose(1, 2), qkv[:, :, heads:-kv_heads, dim:].transpose(1, 2)
    q, k = q.requires_grad_(), k.requires_grad_()
    cos, sin = (values(rows, length, dim // 2, dtype=dtype, seed=seed).repeat(1, 1, 2) for seed in (1, 2))
    out = rotate(q, k, cos, sin)
    assert forced["_Rotate"] == 1
    expected = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    found = gradients(out, q, k)
    for ours, theirs in zip((*out, *found), (*expected, *gradients(expected, q, k)), strict=True):
        assert ours.dtype == dtype and torch.equal(ours, theirs) and ours.transpose(1, 2).is_contiguous()
    # A gradient without strides, and none for k.
    ours, theirs = (torch.autograd.grad(turn(q, k, cos, sin)[0].sum(), q)[0] for turn in (rotate, modeling_llama.apply_rotary_pos_emb))
    assert torch.equal(ours, theirs)


@in_kernels
def test_other_rotations_stay_as_they_are(forced: Counter[str]) -> None:
    """Through the function in transformers' module: other arguments, and shapes that the kernel does not know."""
    original = modeling_llama.apply_rotary_pos_emb
    fuse(build(FAMILIES["llama"][0]))
    cos, sin = (values(2, 5, 4, seed=seed).repeat(1, 1, 2) for seed in (1, 2))
    q, k = values(2, 4, 5, 8), values(2, 2, 5, 8)
    for a, b in zip(modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1), original(q, k, cos, sin), strict=True):
        assert torch.equal(a, b)
    assert forced["_Rotate"] == 1
    square = values(2, 5, 5, 8)  # as many heads as tokens: the shapes say nothing
    others: list[tuple[Tensor, Tensor, Tensor, Tensor, dict[str, int], tuple[int, ...]]] = [
        (square, square, cos, sin, {}, (2,)),
        (square, square, cos, sin, {"unsqueeze_dim": 2}, ()),
        (q[:1], k[:1], cos, sin, {}, ()),
        (q, k, cos[:, :1], sin[:, :1], {}, ()),
    ]
    for *tensors, options, more in others:
        for a, b in zip(modeling_llama.apply_rotary_pos_emb(*tensors, *more, **options), original(*tensors, *more, **options), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(RuntimeError):
        modeling_llama.apply_rotary_pos_emb(q, k, cos[..., :6], sin[..., :6])  # transformers' own complaint
    assert forced["_Rotate"] == 1


@in_kernels
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["plain", "checkpointing", "mlp", "lora"])
def test_whole_models(forced: Counter[str], family: str, way: str) -> None:
    config, modules = FAMILIES[family]
    ids, models = IDS[:, :5].to(DEVICE), [build(config).to(DEVICE) for _ in range(2)]
    if way == "lora":
        models = [add_adapters(model, LoraConfig(r=2), 3) for model in models]
    unfused = outcome(models[0], ids)
    assert not forced and fuse(models[1]) == modules
    if way in ("checkpointing", "mlp"):
        recompute(models[1], way == "checkpointing" or "mlp", "actor")
        models[1].train()
    found = outcome(models[1], ids)
    layers, activations = (2 if way == "checkpointing" else 1), (2 if way in ("checkpointing", "mlp") else 1)
    activation = "_SiluMul" if family == "llama" or way == "lora" else "_GatedDown"  # a bias or an adapter on the last product keeps it apart
    assert forced == {"_RmsNorm": (modules - 3) * layers + 1, activation: 2 * activations, "_Rotate": 2 * layers}
    assert found.keys() == unfused.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, unfused[name], atol=1e-4 * float(unfused[name].abs().max()), rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


# --------------------------------------------------------------------------------------------------------------------------
# What only a GPU can show


class TestOnGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("hidden", [896, 1536, 4096, 8192])
    def test_norm_has_the_bits_of_the_rollout(self, hidden: int) -> None:
        x, weight = values(1, 333, hidden, dtype=HALF), values(hidden, dtype=HALF, seed=1)
        assert torch.equal(rms_norm(x, weight, 1e-6)[0], kernels.add_norm(x[0].clone(), None, weight, 1e-6))
        x.requires_grad_()
        weight.requires_grad_()
        found = gradients(rms_norm(x, weight, 1e-6), x, weight)
        assert all(torch.equal(a, b) for a, b in zip(found, gradients(rms_norm(x, weight, 1e-6), x, weight), strict=True))
        wide_x, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
        wide = wide_x * torch.rsqrt(wide_x.square().mean(-1, keepdim=True) + 1e-6) * wide_weight
        check(found, gradients(wide.to(HALF), wide_x, wide_weight), HALF)

    @pytest.mark.parametrize("width", [4864, 8960])
    def test_gated_activation_has_the_bits_of_the_rollout(self, width: int) -> None:
        gate_up = values(333, 2 * width, dtype=HALF) * 2
        gate, up = (t.contiguous().requires_grad_() for t in gate_up.chunk(2, -1))
        assert torch.equal(silu_mul_pair(gate, up), kernels.silu_mul(gate_up, 333))
        wide_gate, wide_up = gate.detach().double().requires_grad_(), up.detach().double().requires_grad_()
        wide = nn.functional.silu(wide_gate) * wide_up
        check(gradients(silu_mul_pair(gate, up), gate, up), gradients(wide.to(HALF), wide_gate, wide_up), HALF)

    @pytest.mark.parametrize("dim", [64, 128])
    def test_rotation_is_that_of_transformers(self, dim: int) -> None:
        q, k = (values(1, 777, n, dim, dtype=HALF, seed=n).transpose(1, 2).requires_grad_() for n in (14, 2))
        cos, sin = (values(1, 777, dim // 2, dtype=HALF, seed=seed).repeat(1, 1, 2) for seed in (1, 2))
        out, expected = rotate(q, k, cos, sin), modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
        for ours, theirs in zip((*out, *gradients(out, q, k)), (*expected, *gradients(expected, q, k)), strict=True):
            assert torch.equal(ours, theirs) and ours.transpose(1, 2).is_contiguous()

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("adapters", [False, True])
    def test_fused_models_are_as_near_the_truth(self, family: str, packed: bool, adapters: bool) -> None:
        """Logits and gradients in bfloat16 against those of float32: no further away than transformers' and peft's own operations are."""
        config, modules = FAMILIES[family]
        truth, plain = build(config).cuda(), build(config).to("cuda", torch.bfloat16)
        truth.load_state_dict(plain.state_dict())
        model = copy.deepcopy(plain)
        if adapters:
            assert fuse(model) == modules
            truth, plain, model = (with_adapters(one) for one in (truth, plain, model))
            for layer in (*truth.modules(), *plain.modules()):
                if isinstance(layer, LoraLayer):
                    vars(layer).pop("forward")
        ids, inputs = IDS.cuda(), {}
        if packed:
            inputs = inputs_of(ids, pack([13, 9]).to(torch.device("cuda")))
        found: list[dict[str, Tensor]] = []
        for one in (truth, plain, model):
            if packed:
                pack_attention(one)
            if one is model and not adapters:
                assert fuse(one) == modules
            logits = one(**(inputs or {"input_ids": ids, "use_cache": False})).logits
            (logits.float() * torch.linspace(-1, 1, 97, device="cuda")).square().mean().backward()
            found.append({"logits": logits.detach().float()} | {n: p.grad.float() for n, p in one.named_parameters() if p.grad is not None})
        for name, value in found[0].items():
            theirs, ours = (float((f[name] - value).norm() / value.norm()) for f in found[1:])
            assert ours < 2 * theirs + 1e-3, (name, ours, theirs)
        assert relative(found[2], found[0]) < 1.2 * relative(found[1], found[0])
