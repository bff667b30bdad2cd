"""LoRA through peft: adapters on the training model, the reference = adapters off, merged weights for rollouts and export.

Roles that share a base (`share_base`) have modules and adapters of their own around the same frozen parameters (`engine.SharedPlacement`): no adapter
ever has to be switched for another, and each role computes bit for bit as on a base of its own.
"""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlhf import files
from rlhf.config import LoraConfig
from rlhf.models.fused import gated_mlp, is_gated_mlp
from rlhf.models.heads import ScalarModel
from rlhf.ops.fused import gated, gated_gradient, in_autocast, only_kept

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as PEFT names them
TOGETHER = 256 << 20  # bytes of whole weights from which on no more are brought together at a time (ZeRO-3)
SCORE = "base_model.model.score.weight"  # a scalar head beside its adapters

# peft asks transformers for an attribute by its old name: nothing that a user could mend.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def add_adapters(module: nn.Module, config: LoraConfig, seed: int) -> nn.Module:
    """The module with adapters on, in the base's dtype (ZeRO holds their float32 master weights); the same initial values on every rank. A scalar
    head keeps training whole."""
    torch.manual_seed(seed)
    scalar = isinstance(module, ScalarModel)
    _check_names(module, config.target_modules)
    peft_config = _peft_config(config, scalar)
    try:
        # peft would keep adapters in float32; under ZeRO-3 nobody casts them back, and every product would take a float32 copy of its input.
        wrapped: nn.Module = get_peft_model(module, peft_config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"lora.target_modules={config.target_modules}: {error}") from None
    _check_targets(module, config)
    if scalar:
        for parameter in module.score.parameters():  # type: ignore[union-attr]
            parameter.requires_grad_(True)
    for layer in module.modules():
        if type(layer) is LoraLinear and type(layer.get_base_layer()) is nn.Linear:
            layer.forward = functools.partial(_adapted, layer)  # type: ignore[method-assign]
        elif is_gated_mlp(layer):
            layer.forward = functools.partial(_adapted_mlp, layer)
    for layer in module.modules():
        parts = [getattr(layer, name, None) for name in ("q_proj", "k_proj", "v_proj")]
        if all(isinstance(part, LoraLinear) and "forward" in vars(part) for part in parts):
            group = _Together(parts, layer)
            for part in parts:
                part.forward = functools.partial(_adapted, part, together=group)  # type: ignore[union-attr]
    return wrapped


def _peft_config(config: LoraConfig, scalar: bool) -> PeftLoraConfig:
    return PeftLoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        exclude_modules=["score"] if scalar else None,
        modules_to_save=None,
        task_type=None if scalar else "CAUSAL_LM",
    )


class _Together:
    """Projections that attention calls one after the other with the same input: the first call computes them all."""

    def __init__(self, layers: list[Any], attention: nn.Module) -> None:
        self._layers = layers
        self._hook = attention.register_forward_hook(self.clear, always_call=True)
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = []

    def __call__(self, layer: Any, x: Tensor) -> Tensor | None:
        """What `layer` makes of x; None where they cannot be computed together."""
        place = next(i for i, one in enumerate(self._layers) if one is layer)
        if place == 0:
            self._compute(x)
        if self._input is not x or self._outputs[place] is None:
            return None
        out, self._outputs[place] = self._outputs[place], None
        return out

    def clear(self, *_: Any) -> None:
        """After attention, however it ended: nothing is kept."""
        self._input, self._outputs = None, []

    def dissolve(self) -> None:
        self._hook.remove()

    def _compute(self, x: Tensor) -> None:
        self.clear()
        if any(layer._forward_pre_hooks for layer in self._layers):  # each may be given an input of its own (ZeRO-3, gathering by modules)
            return
        found = [f for layer in self._layers if (f := _plain(layer, x)) is not None]
        if len(found) < len(self._layers) or len({(p.scale, p.a.shape, p.bias is None) for p in found}) > 1:
            return
        biases = [p.bias for p in found if p.bias is not None]
        weights = [t for p in found for t in (p.weight, p.a, p.b)]
        outputs = _LoraTogether.apply(x, found[0].scale, torch.cat(biases) if biases else None, *weights)  # type: ignore[no-untyped-call]
        self._input, self._outputs = x, list(outputs)


@dataclass(frozen=True)
class _Plain:
    """A linear layer whose weight is at hand, and its one adapter, switched on."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float


def _plain(layer: Any, x: Tensor) -> _Plain | None:
    """The layer's tensors where products alone compute it: one plain adapter, switched on, in the dtype of its input. Under ZeRO-3 the
    weights are there, because a decoder layer is gathered as a whole, or because DeepSpeed gathers a weight that somebody asks a module for."""
    if type(layer) is not LoraLinear or type(layer.base_layer) is not nn.Linear:
        return None
    base, names = layer.base_layer, list(layer.lora_A)
    plain = names == layer.active_adapters and len(names) == 1 and not (layer.disable_adapters or layer.merged or layer.lora_variant)
    if not plain or in_autocast(x):
        return None
    (name,) = names
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    whole = (base.weight.shape, a.shape[1], b.shape[0]) == ((base.out_features, base.in_features), base.in_features, base.out_features)
    if not whole or layer.fan_in_fan_out or x.dtype != a.dtype or not isinstance(layer.lora_dropout[name], nn.Identity):
        return None
    return _Plain(base.weight, base.bias, a, b, layer.scaling[name])


def _adapted(layer: Any, x: Tensor, *args: Any, together: _Together | None = None, **options: Any) -> Tensor:
    """peft's forward, in products alone where it can be."""
    if together is not None and not (args or options):
        shared = together(layer, x)
        if shared is not None:
            return shared
    found = None if args or options else _plain(layer, x)
    if found is None:
        out: Tensor = LoraLinear.forward(layer, x, *args, **options)
        return out
    out = _LoraProduct.apply(x, found.weight, found.bias, found.a, found.b, found.scale)  # type: ignore[no-untyped-call]
    return out


def _adapted_mlp(module: Any, x: Tensor) -> Tensor:
    """A gated MLP with an adapter on each projection in few large products, where they are all plain; else as without adapters."""
    found = [_plain(getattr(module, name), x) for name in ("gate_proj", "up_proj", "down_proj")]
    layers = [f for f in found if f is not None and f.bias is None]
    if len(layers) < 3 or layers[0].scale != layers[1].scale or layers[0].a.shape != layers[1].a.shape:
        return gated_mlp(module, x)
    gate, up, down = layers
    weights = (gate.weight, gate.a, gate.b, up.weight, up.a, up.b, down.weight, down.a, down.b)
    out: Tensor = _LoraMlp.apply(x, gate.scale, down.scale, *weights)  # type: ignore[no-untyped-call]
    return out


def has_joined_mlps(module: nn.Module) -> bool:
    """Whether MLPs compute in `_LoraMlp`, which copies their weights beside those of adapters: each projection has one."""

    def joined(part: nn.Module) -> bool:
        forward, names = vars(part).get("forward"), ("gate_proj", "up_proj", "down_proj")
        adapted = isinstance(forward, functools.partial) and forward.func is _adapted_mlp
        return adapted and all(isinstance(getattr(part, name), LoraLinear) for name in names)

    return any(joined(part) for part in module.modules())


class _LoraProduct(torch.autograd.Function):
    """x W' + bias + scale x A' B', and its gradients: the adapter is added by the products themselves, not by passes over tensors as wide as the
    layer. x [..., in], W [out, in] and bias [out] frozen, A [r, in], B [out, r]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        inner = (rows @ a.t()).mul_(scale)
        out.addmm_(inner, b.t())
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scale = scale
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        x, weight, a, b, inner = ctx.saved_tensors
        rows, d_rows = x.reshape(-1, x.shape[-1]), d_out.reshape(-1, d_out.shape[-1])
        d_inner = (d_rows @ b).mul_(ctx.scale)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (d_rows @ weight).addmm_(d_inner, a).view(x.shape)
        _, _, _, learns_a, learns_b, _ = ctx.needs_input_grad
        return d_x, None, None, d_inner.t() @ rows if learns_a else None, d_rows.t() @ inner if learns_b else None, None


class _LoraMlp(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) and its gradients, every projection with an adapter. x [..., H]; weights [I, H], [I, H] and [H, I], frozen.

    Adding an adapter to [n, I] that is there already costs a pass over it, half as long as the product itself in a small model. So the low-rank part
    rides along as further columns: [x, s x A'] [W, B]' is W's product and the adapter's in one, of gate and up together, and so is [d, s d B] [W; A]
    behind `down`. What `down` takes is not kept but made again, as in `ops.fused.gated_down`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, scale_down: float, *weights: Tensor) -> Tensor:
        w_down, a_down, b_down = weights[6:]
        rows = x.reshape(-1, x.shape[-1])
        wide = _beside(rows, torch.cat(weights[1:6:3]).t(), scale)
        gate_up = wide @ _stacked(weights[:6]).t()
        inner = gated(gate_up)
        low = _scaled(inner, a_down.t(), scale_down)
        ctx.save_for_backward(wide, gate_up, low, *weights)
        ctx.scale, ctx.scale_down = scale, scale_down
        if only_kept():
            return torch.empty_like(x)
        return (inner @ w_down.t()).addmm_(low, b_down.t()).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        wide, gate_up, low, *weights = ctx.saved_tensors
        w_down, a_down, b_down = weights[6:]
        d_rows = d_out.reshape(-1, len(w_down))
        d_wide = _beside(d_rows, b_down, ctx.scale_down)
        inner = d_wide @ torch.cat((w_down, a_down))  # its gradient first, then itself
        d_gate_up = gated_gradient(gate_up, inner)
        d_down = d_wide[:, len(w_down) :].t() @ inner, d_rows.t() @ low
        del inner, d_wide
        d_x, d_gates = _stacked_gradients(wide, d_gate_up, ctx.scale, weights[:6])
        return d_x.view(d_out.shape), None, None, *d_gates, None, *d_down


class _LoraTogether(torch.autograd.Function):
    """Several adapted layers on one input as one product, as in `_LoraMlp`. x [..., H]; bias of all outputs, frozen; -> [..., outputs] of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, bias: Tensor | None, *weights: Tensor) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        wide = _beside(rows, torch.cat(weights[1::3]).t(), scale)
        stacked = _stacked(weights)
        out = wide @ stacked.t() if bias is None else torch.addmm(bias, wide, stacked.t())
        ctx.save_for_backward(wide, *weights)
        ctx.scale, ctx.shape = scale, x.shape
        *parts, last = out.split([len(w) for w in weights[::3]], 1)
        parts.append(last.contiguous())  # attention keeps the values as they are: as a part of `out` they would keep it all
        return tuple(part.view(*x.shape[:-1], part.shape[1]) for part in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outs: Tensor) -> tuple[Tensor | None, ...]:
        wide, *weights = ctx.saved_tensors
        d_out = torch.cat([d.reshape(len(wide), -1) for d in d_outs], 1)
        d_x, found = _stacked_gradients(wide, d_out, ctx.scale, weights)
        return d_x.view(ctx.shape), None, None, *found


def _scaled(x: Tensor, w: Tensor, scale: float) -> Tensor:
    """scale * x @ w, rounded once."""
    return x.new_empty(len(x), w.shape[1]).addmm_(x, w, beta=0, alpha=scale)


def _beside(x: Tensor, w: Tensor, scale: float) -> Tensor:
    """[x, scale * x @ w]: [n, k] and [k, r] -> [n, k + r]."""
    out = x.new_empty(len(x), x.shape[1] + w.shape[1])
    out[:, : x.shape[1]] = x
    out[:, x.shape[1] :].addmm_(x, w, beta=0, alpha=scale)
    return out


def _stacked(weights: Sequence[Tensor]) -> Tensor:
    """From W, A and B of each of k layers on one input [[W_1, B_1, 0, ...], [W_2, 0, B_2, ...], ...]: [all outputs, H + k r], for the columns of
    [x, x A_1', x A_2', ...]."""
    layers = list(zip(weights[::3], weights[1::3], weights[2::3], strict=True))
    (_, hidden), rank = weights[0].shape, len(weights[1])
    out = weights[0].new_zeros(sum(len(w) for w, _, _ in layers), hidden + len(layers) * rank)
    row = 0
    for i, (w, _, b) in enumerate(layers):
        out[row : row + len(w), :hidden] = w
        out[row : row + len(w), hidden + i * rank : hidden + (i + 1) * rank] = b
        row += len(w)
    return out


def _stacked_gradients(wide: Tensor, d_out: Tensor, scale: float, weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """(d_x [n, H], what `_stacked` was given: None for each W, and gradients of A and B) of out = [x, scale x A'] stacked'."""
    hidden, rank = weights[0].shape[1], len(weights[1])
    d_wide = d_out @ _stacked(weights)
    d_low = d_wide[:, hidden:]
    d_x = torch.addmm(d_wide[:, :hidden], d_low, torch.cat(list(weights[1::3])), alpha=scale)
    d_a = (d_low.t() @ wide[:, :hidden]).mul_(scale)
    d_b = d_out.t() @ wide[:, hidden:]
    found: list[Tensor | None] = []
    row = 0
    for i, w in enumerate(weights[::3]):
        columns = slice(i * rank, (i + 1) * rank)
        found += [None, d_a[columns], d_b[row : row + len(w), columns]]
        row += len(w)
    return d_x, found


def _check_names(module: nn.Module, targets: str | list[str]) -> None:
    """ValueError for a name that no module has: peft is content with one that fits, and adapts less than was asked for."""
    paths = [path for path, _ in module.named_modules()]
    for name in targets if isinstance(targets, list) else ():
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            linear = {path.rpartition(".")[2] for path, part in module.named_modules() if isinstance(part, nn.Linear)}
            close = difflib.get_close_matches(name, linear, 1, 0.6)
            mend = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(linear))}"
            raise ValueError(f"lora.target_modules={targets}: no module is called {name}; {mend}")


def _check_targets(module: nn.Module, config: LoraConfig) -> None:
    """Raises ValueError for adapters that cannot be merged: on an embedding, or on a weight that another module shares (tied, trap 33)."""
    owners: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.replace(".base_layer.", "."))
    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            base: Any = layer.get_base_layer()
            if not hasattr(base, "weight"):
                raise ValueError(
                    f"lora.target_modules={config.target_modules}: adapters on all experts at once ({type(base).__name__}) cannot be merged; name "
                    "linear layers, as [q_proj, k_proj, v_proj, o_proj]"
                )
            names = owners[id(base.weight)]
            if not layer.lora_A:
                raise ValueError(f"lora.target_modules={config.target_modules}: {names[0]} is no linear layer; leave it out")
            if len(names) > 1:
                raise ValueError(f"lora.target_modules={config.target_modules}: {' and '.join(names)} are one tied weight; leave it out")


def as_peft(module: nn.Module) -> None:
    """From here on adapted layers inside of `module` compute by peft's own operations."""
    for part in module.modules():
        forward = vars(part).get("forward")
        if isinstance(forward, functools.partial) and forward.func in (_adapted, _adapted_mlp):
            if together := forward.keywords.get("together"):
                together.dissolve()
            del part.forward


def adapters_off(module: nn.Module) -> AbstractContextManager[None]:
    """Within it the model computes as its frozen base does (trap 14)."""
    assert isinstance(module, PeftModel)
    context: AbstractContextManager[None] = module.disable_adapter()
    return context


def adapter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """What an adapter file holds, by its names there: the LoRA matrices and a scalar head."""
    return {name.replace(".default.", "."): p for name, p in module.named_parameters() if ".lora_" in name or name == SCORE}


def check_adapter(folder: Path | None, base: Path, key: str) -> None:
    """ValueError unless `folder` is what `export_adapter` writes of a reward model that was trained with LoRA on the model folder `base`."""

    def refusal(why: str) -> ValueError:
        mend = "share_base needs the folder adapter/ of a reward model trained with reward_model.lora on the actor's folder; or set share_base=false"
        return ValueError(f"{key}.path={folder}: {why}; {mend}")

    if folder is None or not all((folder / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)):
        raise refusal(f"no adapter ({ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}) in it")
    given = files.read_object(folder / ADAPTER_CONFIG)
    origin = given.get("base_model_name_or_path")
    if given.get("peft_type") != "LORA" or origin is None:
        raise refusal(f"an adapter of type {given.get('peft_type')} on the base {origin}")
    if Path(origin).resolve() != base.resolve():
        raise refusal(f"trained on the base {origin}, but the actor's is {base.resolve()}: on other weights it would score something else")
    adapters = PeftLoraConfig.from_pretrained(str(folder))
    plain = _peft_config(_plain_config(adapters), scalar=True).to_dict()
    if odd := _beyond_plain(adapters, plain | {"fan_in_fan_out": adapters.fan_in_fan_out}):  # of the base's layers, which are not here yet
        raise refusal(f"adapters with {odd} are not supported")
    with files.open_tensors(folder / ADAPTER_WEIGHTS) as file:
        if SCORE not in file.keys():  # noqa: SIM118 (not a mapping)
            raise refusal("an adapter without a scalar head")


# What an adapter's config says of how it was made and wrapped; the names of its matrices tell where they sit.
_HARMLESS = {
    *("base_model_name_or_path", "exclude_modules", "inference_mode", "init_lora_weights"),
    *("lora_dropout", "modules_to_save", "peft_version", "target_modules", "task_type"),
}


def _plain_config(given: PeftLoraConfig) -> LoraConfig:
    targets = given.target_modules
    return LoraConfig(r=given.r, alpha=given.lora_alpha, target_modules=targets if isinstance(targets, str) else sorted(targets or ()))


def _beyond_plain(given: PeftLoraConfig, ours: dict[str, Any]) -> str:
    """What adapters have that plain LoRA (`ours`) has not."""
    theirs = given.to_dict()
    return ", ".join(f"{name}={value}" for name, value in theirs.items() if name not in _HARMLESS and value != ours.get(name))


def load_adapter(module: ScalarModel, folder: Path) -> nn.Module:
    """The reward model of `folder` (see `check_adapter`) on the body of `module`. ValueError if it does not fit or is more than plain LoRA."""
    files.read_object(folder / ADAPTER_CONFIG)  # or it is refused
    given = PeftLoraConfig.from_pretrained(str(folder))
    wrapped = add_adapters(module, _plain_config(given), seed=0)
    if odd := _beyond_plain(given, wrapped.peft_config["default"].to_dict()):  # type: ignore[index,union-attr]
        raise ValueError(f"{folder}: adapters with {odd} are not supported")
    parameters, tensors = adapter_parameters(wrapped), files.read_tensors(folder / ADAPTER_WEIGHTS)
    if wrong := {(n, p.shape) for n, p in parameters.items()} ^ {(n, t.shape) for n, t in tensors.items()}:
        raise ValueError(f"{folder}: the adapters do not fit the base: {sorted(name for name, _ in wrong)[:3]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return wrapped


def kept_whole(module: nn.Module, ranks: int, zero: Mapping[str, Any]) -> int:
    """Elements up to which ZeRO-3 keeps a parameter on every rank where the DeepSpeed JSON does not say: DeepSpeed's own 100,000, and adapters, which
    are small and many: gathered one by one, the 392 of a 7B model take longer than their bytes. Base weights as small stay whole too. A single rank
    holds all there is of every parameter, unless `offload_param` sends it to the host. zero: the JSON's `zero_optimization`."""
    if ranks == 1 and (zero.get("offload_param") or {}).get("device", "none") == "none":
        return 1 << 62
    return max([100_000, *(p.numel() for name, p in module.named_parameters() if ".lora_" in name)])


def frozen_base(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters below the adapters, by their name in the plain model."""
    return {source.name: source.weight for source in weight_layout(module)}


@dataclass(frozen=True)
class WeightSource:
    """Where one tensor of the plain model comes from: a parameter, plus scale * B @ A where an adapter sits on it."""

    name: str  # in the plain model's state dict
    weight: nn.Parameter
    lora_a: nn.Parameter | None = None
    lora_b: nn.Parameter | None = None
    scale: float = 0.0
    transposed: bool = False  # the weight is stored [in, out] (gpt2's Conv1D)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in (self.weight, self.lora_a, self.lora_b) if p is not None]

    def merged(self) -> Tensor:
        """The tensor as the plain model should hold it; merged in float32 out of place, the training weights are not touched."""
        weight = self.weight.detach()
        if self.lora_a is None or self.lora_b is None:
            return weight
        return (weight.float() + self.update(self.lora_a.detach(), self.lora_b.detach())).to(weight.dtype)

    def update(self, a: Tensor, b: Tensor) -> Tensor:
        """scale * B @ A in float32, in the weight's layout. a: [r, in], b: [out, r]."""
        update = b.float() @ a.float()
        return self.scale * (update.T if self.transposed else update)

    def wrongly_merged(self, before: Tensor, after: Tensor, a: Tensor, b: Tensor, rows: slice) -> Tensor:
        """How many elements of `after` are not those of `before` with the adapter added, both being these rows of the weight. Worked out in float64;
        beside the one rounding there is room for what the terms of the product lose on the way (TensorFloat-32 included)."""
        left, right = (a.t(), b.t()) if self.transposed else (b, a)
        left, right = left[rows].double() * self.scale, right.double()
        expected = before.double() + left @ right
        room = 2**-7 * expected.abs() + 2**-9 * (left.abs() @ right.abs()) + 1e-6
        return (~((after.double() - expected).abs() <= room)).sum()

    def merge(self, a: Tensor, b: Tensor, rows: slice, weight: Tensor, out: Tensor) -> None:
        """out = weight + scale * B @ A, both being these rows of the whole; rounded once. They may be the same tensor.

        A half-precision weight takes float32 adapters as two halves each (Markidis et al. 2018, arXiv:1803.04014: hi hi + hi lo + lo hi), so that the
        tensor cores multiply them, and what is lost is far below the one rounding.
        """
        if weight.dtype == out.dtype == torch.bfloat16:
            if a.dtype == torch.float32:
                a_high, b_high = a.bfloat16(), b.bfloat16()
                a = torch.cat((a_high, a_high, (a - a_high).bfloat16()))
                b = torch.cat((b_high, (b - b_high).bfloat16(), b_high), 1)
            left, right = (a.t(), b.t()) if self.transposed else (b, a)
            torch.addmm(weight, left[rows], right, alpha=self.scale, out=out)  # accumulates in float32, and adds before it rounds
            return
        out.copy_(weight.float() + self.update(a, b)[rows])


def weight_layout(module: nn.Module) -> list[WeightSource]:
    """One source per parameter of the plain model, tied ones once, adapters folded in."""
    inner = module.get_base_model() if isinstance(module, PeftModel) else module
    adapted = {id(m.get_base_layer().weight): m for m in inner.modules() if isinstance(m, LoraLayer)}
    layout = []
    for name, parameter in inner.named_parameters():
        if ".lora_" in name:
            continue
        layer = adapted.get(id(parameter))
        plain = name.replace(".base_layer.", ".")
        if layer is None:
            layout.append(WeightSource(plain, parameter))
        else:
            (adapter,) = layer.lora_A.keys()
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            layout.append(WeightSource(plain, parameter, a, b, float(layer.scaling[adapter]), layer.fan_in_fan_out))
    return layout
