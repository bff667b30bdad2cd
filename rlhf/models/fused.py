"""Puts the fused kernels of `rlhf.ops.fused` into transformers' llama, qwen2, qwen3 and mistral: norms, gated MLPs, rotary embedding."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.ops.fused import gated_down, linear, rms_norm, rotate, rotates, silu_mul_pair

# Those of the rollout's lean decoder. Their layers add what the MLP gives to the residual, and nothing else takes it: a second run of a layer or MLP
# leaves it undefined (`ops.fused.computed_again`). A family that multiplies or norms it first must not come in here as it is.
FAMILIES = {"llama", "qwen2", "qwen3", "mistral"}

Rotary = Callable[..., tuple[Tensor, Tensor]]
_replaced: set[Rotary] = set()  # functions that stand in for a family's `apply_rotary_pos_emb`


def fuse(model: nn.Module) -> int:
    """Number of norms and MLPs whose forward was replaced (linear layers are, too): 0 for other architectures, and when everything has been replaced
    before.

    It may be a causal LM, its body, or what wraps them. Off the GPU and in float32 the new forwards are the old operations (until `models.lora` puts
    others in the place of MLPs whose projections have adapters). The rotary embedding is
    a function of the family's module: replaced once, for all its models in this process."""
    count = 0
    for body in list(model.modules()):
        if not isinstance(body, PreTrainedModel) or body.config.model_type not in FAMILIES or body.config.hidden_act != "silu":
            continue
        if not type(body).__module__.startswith("transformers.models."):  # code of a model folder may compute anything under these names
            continue
        for module in body.modules():
            _fuse_rotary(module)
            forward = _forward_of(module)
            if "forward" not in vars(module) and type(module) is nn.Linear:
                module.forward = functools.partial(_linear, module)  # type: ignore[method-assign]
            elif forward is not None and "forward" not in vars(module):
                module.forward = functools.partial(forward, module)  # a partial follows its module through copies and pickles
                count += 1
    return count


def _forward_of(module: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    def has(*names: str) -> bool:
        return all(hasattr(module, name) for name in names)

    if type(module).__name__.endswith("RMSNorm") and has("weight", "variance_epsilon"):
        return _norm
    if has("gate_proj", "up_proj", "down_proj", "act_fn") and type(module.act_fn).__name__.startswith("SiLU"):
        return gated_mlp
    return None


def _linear(module: Any, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether `fuse` has made it compute `gated_mlp`."""
    forward = vars(module).get("forward")
    return isinstance(forward, functools.partial) and forward.func is gated_mlp


def _norm(module: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def gated_mlp(module: Any, x: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)). The projections are called as modules: they may be adapters, and DeepSpeed gathers weights in their hooks. Only
    the last, where it is a plain product whose weight is at hand, is taken together with the activation."""
    gate, up, last = module.gate_proj(x), module.up_proj(x), module.down_proj
    plain = type(last) is nn.Linear and last.bias is None and not last._forward_hooks and not last._forward_pre_hooks
    if plain and last.weight.shape == (last.out_features, last.in_features):
        return gated_down(gate, up, last.weight)
    down: Tensor = last(silu_mul_pair(gate, up))
    return down


def _fuse_rotary(attention: nn.Module) -> None:
    if not all(hasattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")):
        return
    family = sys.modules[type(attention).__module__]
    original: Rotary | None = getattr(family, "apply_rotary_pos_emb", None)
    if original is None or original in _replaced:
        return

    @functools.wraps(original)
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        plain = not args and options.get("unsqueeze_dim", 1) == 1 and options.keys() <= {"unsqueeze_dim"}
        if plain and not torch.compiler.is_compiling() and rotates(q, k, cos, sin):  # a compiled model of the same family has the operations
            return rotate(q, k, cos, sin)
        return original(q, k, cos, sin, *args, **options)

    _replaced.add(apply_rotary_pos_emb)
    family.apply_rotary_pos_emb = apply_rotary_pos_emb  # type: ignore[attr-defined]
