"""What a trained model computes again in its backward pass instead of keeping it (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost",
arXiv:1604.06174): nothing, the MLP of every decoder layer, or whole layers."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rlhf.config import Recomputed
from rlhf.ops.fused import computed_again

MLP_NAMES = ("mlp", "feed_forward", "ffn")  # what families call it


def decoder_layers(module: nn.Module) -> nn.ModuleList:
    """The decoder layers, sharded by ZeRO-3 or not."""

    def size(layers: nn.ModuleList) -> int:
        return sum(getattr(p, "ds_numel", p.numel()) for p in layers.parameters())

    return max((m for m in module.modules() if isinstance(m, nn.ModuleList)), key=size)


def mlps(module: nn.Module, key: str) -> list[nn.Module]:
    """The MLP of every decoder layer. ValueError that names the mend where a layer has none under the names that are known."""
    found = []
    for layer in decoder_layers(module):
        part = next((m for name in MLP_NAMES if isinstance(m := getattr(layer, name, None), nn.Module)), None)
        if part is None:
            raise ValueError(
                f"{key}.gradient_checkpointing=mlp: {type(layer).__name__} has no module called {', '.join(MLP_NAMES[:-1])} or {MLP_NAMES[-1]}; "
                "set it to true (whole layers) or false"
            )
        found.append(part)
    return found


def known_mlps(module: nn.Module) -> list[nn.Module]:
    """The same, none where a layer has none under those names."""
    try:
        return mlps(module, "")
    except ValueError:
        return []


def recompute(module: Any, what: Recomputed, key: str) -> None:
    """From here on the backward pass computes this much of the model again. After adapters and fused kernels are in place, or compiled
    layers: their own forwards are where some versions of transformers look whether to checkpoint. ValueError as `mlps`."""
    if what == "mlp" or (what and "forward" in vars(decoder_layers(module)[0])):
        parts: Any = mlps(module, key) if what == "mlp" else decoder_layers(module)
        for part in dict.fromkeys(parts):  # layers may be one module (`probe.stand_in`)
            # A method is the same for every layer, a partial would be a graph of its own where layers are compiled.
            part.forward = functools.partial(_again, part.forward) if "forward" in vars(part) else types.MethodType(_again_plain, part)
    elif what:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": _contexts})


def _again_plain(module: nn.Module, *inputs: Any, **options: Any) -> Any:
    def forward(*inputs: Any, **options: Any) -> Any:
        return type(module).forward(module, *inputs, **options)

    return _again(forward, *inputs, **options)


def _again(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    # Nothing in it is random: dropout is off everywhere (trap 2). Inside of a compiled layer there are no kernels to tell, and its partitioner sees
    # to it that the second run makes what is needed.
    told = {} if torch.compiler.is_compiling() else {"context_fn": _contexts}
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **told, **options)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first run and the second. A layer's output is a sum that keeps nothing, so no second run needs what its MLP ends with."""
    return nullcontext(), computed_again()
