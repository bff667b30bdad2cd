"""torch.compile of decoder layers: one graph for all layers of a model, for forwards of any length.

What is compiled are transformers' own operations, so that inductor fuses what lies between the products (residuals and norms, biases and rotary
embedding, activations); `fused.fuse` is left out. Two things are lost with it: `gated_down` keeps only the MLP's inner products for the backward
pass and not their gated result, which a compiled layer may keep too, and `computed_again` spares a recomputed MLP its last product.

Under ZeRO-3 a graph reads parameters that are given back after the layer's forward and gathered again before its backward pass. It may keep the
parameters themselves, whose data DeepSpeed swaps, but no view of their data: that would keep every gathered layer alive (see `_product`).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import types
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from rlhf.models.checkpointing import decoder_layers
from rlhf.models.lora import as_peft

BACKEND = "inductor"
APART = "aot_eager_decomp_partition"  # keeps what inductor does, and generates no code

# All models of a family share one code object and with it one limit on its graphs: with and without gradients, in training mode and not, with
# adapters and without, for each role. A graph per layer would show in far more.
GRAPHS = 64


def compile_layers(module: nn.Module, apart: bool = False) -> None:
    """From here on the decoder layers compute in compiled graphs. After adapters, before `checkpointing.recompute` and DeepSpeed. apart: in graphs
    of their own that are no faster, to see what they keep.

    In half precision inductor rounds where the plain operations round: the update then scores with the function that sampled (trap 2), and forwards
    with gradients agree with those without, which are other graphs."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    backend = APART if apart else BACKEND
    options = {"emulate_precision_casts": True} if backend == "inductor" else None
    # Graphs are found by the code object.
    layer = types.FunctionType(_layer.__code__.replace(co_name="_layer_apart"), _layer.__globals__) if apart else _layer
    compiled = torch.compile(layer, dynamic=True, backend=backend, options=options)
    for one in dict.fromkeys(decoder_layers(module)):  # layers may be one module (`probe.stand_in`)
        as_peft(one)
        for part in one.modules():
            if type(part) is nn.Linear:
                part.forward = types.MethodType(_product, part)  # type: ignore[method-assign]
        one.forward = functools.partial(compiled, one)


def _layer(layer: nn.Module, *inputs: Any, **options: Any) -> Any:
    forward: Callable[..., Any] = type(layer).forward
    return forward(layer, *inputs, **options)


def _product(module: nn.Linear, x: Tensor) -> Tensor:
    """torch's own linear, which DeepSpeed replaces for the whole process by one that looks into the parameter's ZeRO-3 bookkeeping: torch 2.11 would
    make a graph for every `ds_id`, that is for every layer. A compiled graph does not need it, as long as its backward pass starts from the parameter
    and not from a transposed view; `tests/distributed/test_compiling.py` watches that."""
    out: Tensor = torch._C._nn.linear(x, module.weight, module.bias)
    return out


def check_compile(model: nn.Module, key: str, stage: int, on_gpu: bool) -> None:
    """ValueError with key and mend where layers cannot be compiled. model: of the role's architecture, without its adapters."""
    if why := _missing_tool(on_gpu):
        raise ValueError(f"{key}.compile=true: {why}; install it, or set compile=false")
    whole = {name for part in model.modules() for name in (getattr(part, "_no_split_modules", None) or ())}
    strange = sorted({type(layer).__name__ for layer in decoder_layers(model)} - whole)
    if stage == 3 and strange:
        raise ValueError(
            f"{key}.compile=true: {strange[0]} is not among the model's _no_split_modules, so ZeRO-3 would gather its weights one by one from inside "
            "of a compiled graph; use ds_configs/zero2.json, or set compile=false"
        )


def _missing_tool(on_gpu: bool) -> str | None:
    """What inductor lacks here."""
    kind, variable, names = ("C", "CC", ("gcc", "clang")) if on_gpu else ("C++", "CXX", ("g++", "clang++"))
    if on_gpu and importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton on a GPU, which is not installed"
    if not any(shutil.which(name) for name in (os.environ.get(variable, ""), *names) if name):
        return f"torch.compile needs a {kind} compiler, and there is no {' or '.join(names)} (nor a program called ${variable})"
    return None
