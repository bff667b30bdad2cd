"""What a forward keeps of each token for its backward pass, counted and not estimated: the very model, fused, adapted or compiled as it will train,
runs once on the meta device, where tensors have shapes and no contents, and autograd says what it saves.

Attention keeps there what variable-length flash attention keeps (Dao 2023, "FlashAttention-2", arXiv:2307.08691): queries, keys, values, what comes
out, and a log-sum-exp of each head.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf.models.checkpointing import decoder_layers, known_mlps, recompute
from rlhf.models.compiling import compile_layers
from rlhf.models.packing import pack_attention
from rlhf.models.rotary import freeze

TOKENS = 1024  # of the row that is tried: what does not grow with it is spread over so many
COUNTED = "rlhf_counted"  # as `packing.NAME`: no mask function has this name


@dataclass(frozen=True)
class Kept:
    """Bytes of a token."""

    layer: float  # in a decoder layer, in the mean
    mlp: float  # of that in its MLP; 0 where there is none that `checkpointing` could compute again
    entering: float  # what an MLP that is computed again keeps in the place of that: its input, unless something before it does
    rest: float  # before, between and behind the layers: positions and angles, the final norm; not the head


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device), torch.zeros(q.shape[:-1], device=q.device)


def _backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


# q [..., HQ, D], k and v [..., HK, D] -> [..., HQ, D of v] and [..., HQ], without contents: keeps what attention does. Operations of torch's, as
# attention is one, and no compiler looks into them: it would find that nothing is computed from what is kept.
kept_attention = torch.library.custom_op("rlhf::kept_attention", _forward, mutates_args=())
kept_attention_backward = torch.library.custom_op("rlhf::kept_attention_backward", _backward, mutates_args=())
kept_attention.register_fake(_forward)
kept_attention_backward.register_fake(_backward)
kept_attention.register_autograd(
    lambda ctx, d_out, _: kept_attention_backward(d_out.contiguous(), *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """transformers' attention interface, as `packing.packed_attention`."""
    return kept_attention(*(t.transpose(1, 2).contiguous() for t in (query, key, value)))[0], None


ALL_ATTENTION_FUNCTIONS.register(COUNTED, _attention)


def count_kept(module: nn.Module, compiled: bool, row: int | None = None) -> Kept:
    """What a forward in training mode keeps. module: a causal LM or `ScalarModel` on the meta device, dropout at 0, adapters on; not to be used
    afterwards. compiled: as its layers will be, which takes seconds. row: tokens of one, where they are not packed: a model's own attention may keep
    a matrix of them, and recurrent layers pad them, and copy for several. Raises what a forward on the meta device does,
    for a model that reads values."""
    freeze(module)  # or it looks at positions
    if row is None or not _has_own_attention(module):
        pack_attention(module, COUNTED)
    layers, parts, shape = decoder_layers(module), known_mlps(module), (1, TOKENS) if row is None else (2, row)
    if not compiled:
        found = _count(module, shape, layers, parts)
        return Kept(found["layer"] + found["mlp"], found["mlp"], found["entering"], found["rest"])
    compile_layers(module, apart=True)
    found, mlp = _count(module, shape, layers, []), 0.0
    if parts:
        recompute(module, "mlp", "")
        compile_layers(module, apart=True)
        mlp = found["layer"] - _count(module, shape, layers, [])["layer"]
    return Kept(found["layer"], mlp, 0.0, found["rest"])


def _has_own_attention(module: nn.Module) -> bool:
    """Whether attention, where rows are not packed, is the model's own code: outside of transformers' interface, or "eager"."""
    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    return any(part.config._attn_implementation == "eager" or not part._can_set_attn_implementation() for part in models)


def _count(module: Any, shape: tuple[int, int], layers: nn.ModuleList, parts: list[nn.Module]) -> Counter[str]:
    """As `_called`: without a mask, as the program calls the model, or where that looks for padding in the ids, with one that says there is none."""
    ids = torch.zeros(shape, dtype=torch.int64, device="meta")
    inputs = {"input_ids": ids, "position_ids": torch.arange(shape[1], device="meta").expand(shape)}
    try:
        return _called(module, inputs, layers, parts)
    except Exception:
        return _called(module, {**inputs, "attention_mask": torch.ones_like(ids)}, layers, parts)


def _called(module: Any, inputs: dict[str, Tensor], layers: nn.ModuleList, parts: list[nn.Module]) -> Counter[str]:
    """Bytes of a token by the place that keeps them first, those of layers in the mean: "mlp" (one of `parts`), else "layer", else "rest", or "head";
    and "entering". Every storage once, parameters and buffers never, and what all layers are given (angles) as the rest's."""
    found: Counter[str] = Counter()
    places, alive = ["rest"], []
    seen = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    given: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            alive.append(storage)  # or its address might be another's
            found["rest" if storage._cdata in given else places[-1]] += storage.nbytes()
        return tensor

    def enter(place: str) -> Any:
        def hook(part: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            if place == "layer":
                others = {**options, "": args[1:]} if args else {k: v for k, v in options.items() if k != "hidden_states"}
                tensors = [t for t in tree_leaves(others) if isinstance(t, Tensor)]
                alive.extend(tensors)
                given.update(t.untyped_storage()._cdata for t in tensors)
            elif place == "mlp":
                storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tree_leaves((args, options)) if isinstance(t, Tensor))}
                found["entering"] += sum(size for storage, size in storages.items() if storage not in seen)
            places.append(place)

        return hook

    def leave(*_: Any) -> None:
        places.pop()

    tokens = inputs["input_ids"].numel()
    no_cache = {} if hasattr(module, "score") else {"use_cache": False}  # `ScalarModel` says so itself
    with ExitStack() as hooks:
        for place, modules in (("layer", layers), ("mlp", parts), ("head", [_head(module)])):
            for part in modules:
                hooks.callback(part.register_forward_pre_hook(enter(place), with_kwargs=True).remove)
                if place != "head":  # what follows the head is not the model's
                    hooks.callback(part.register_forward_hook(leave).remove)
        embedding = module.get_input_embeddings()
        hooks.callback(embedding.register_forward_hook(lambda _, __, out: out.requires_grad_()).remove)  # under adapters, as behind a layer
        with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
            module.train()(**inputs, **no_cache)
    shares = dict.fromkeys(("layer", "mlp", "entering"), len(layers))
    return Counter({place: count / tokens / shares.get(place, 1) for place, count in found.items()})  # type: ignore[misc]


def _head(module: Any) -> nn.Module:
    head: nn.Module = module.score if hasattr(module, "score") else module.get_output_embeddings()
    return head
