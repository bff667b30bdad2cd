"""Packed forwards: sequences one behind the other in one row, without padding. Attention is the one place where they would meet, so it is replaced.

The model is told the boundaries through the keyword `packed`, which transformers' models hand down to their attention, also where a layer is computed
again for the backward pass.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf.batching import in_groups, pack
from rlhf.models.rotary import freeze
from rlhf.types import Packed

# No mask function is registered under this name on purpose: transformers' mask creation then returns None at once.
NAME = "rlhf_packed"

# Options of the attention call that say nothing new. Any other that is set (softcap, s_aux, position_bias, ...) is refused.
_KNOWN = {"position_ids", "cache_position", "use_cache", "packed"}

if torch.cuda.is_available():
    from torch.nn.attention.varlen import varlen_attn

    # Before 2.12 fewer key heads than query heads go without saying.
    GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class _Latest:
    """The packing of the latest forward; its backward pass follows before another forward begins."""

    packed: Packed | None = None


_latest = _Latest()


def announce(packed: Packed) -> None:
    """Of the forward that comes next."""
    _latest.packed = packed


def objection(module: nn.Module, attention_mask: Tensor | None, dropout: float, is_causal: bool | None, options: dict[str, Any]) -> str | None:
    """What a call of transformers' attention interface asks for beyond causal attention inside each sequence."""
    if attention_mask is not None:
        return "its attention wants a mask or bias of its own"
    if dropout:
        return "attention dropout"
    if is_causal is False or not getattr(module, "is_causal", True):
        return "attention that is not causal"
    asked = (name for name, option in options.items() if option is not None and option is not False and name not in _KNOWN)
    return next((f"attention with {name}" for name in asked), None)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    packed: Packed | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, HQ, t, D], key and value [1, HK, t, D] -> [1, t, HQ, D]. Causal, every sequence alone."""
    packed = _latest.packed if packed is None else packed  # some families keep keywords to themselves
    if packed is None:
        raise ValueError("a model for packed rows was called without a packing")
    if query.shape[0] != 1 or query.shape[2] != len(packed.positions):
        raise ValueError(f"a model for packed rows was called with {tuple(query.shape[::2])} tokens; the packing has {len(packed.positions)}")
    if why := objection(module, attention_mask, dropout, is_causal, options):
        raise ValueError(why)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [t, heads, D]
    if q.is_cuda and q.dtype != torch.float32 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and v.shape[-1] == q.shape[-1]:
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        ends, longest = packed.boundaries, packed.longest
        out: Tensor = varlen_attn(
            q.contiguous(), k.contiguous(), v.contiguous(), ends, ends, longest, longest, window_size=window, scale=scale, **GROUPED
        )
        return out[None], None
    return _in_groups(q, k, v, packed, scale, sliding_window)[None], None


@torch.compiler.disable  # as many products as there are groups: a compiled graph would be another for every packing
def _in_groups(q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float, window: int | None) -> Tensor:
    """Sequences of about the same length side by side, padded on the right for this one operation."""
    done = []
    for group in in_groups(packed):
        rows, width = group.index.shape
        side = [t[group.index.flatten()].view(rows, width, *t.shape[1:]).transpose(1, 2) for t in (q, k, v)]
        mask = None
        if window is not None and window < width:
            place = torch.arange(width, device=q.device)
            mask = (place[None, :] <= place[:, None]) & (place[None, :] > place[:, None] - window)
        out = F.scaled_dot_product_attention(*side, mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        done.append(out.transpose(1, 2).flatten(0, 1)[group.real])
    return torch.cat(done)


def _mask_asked_for(
    batch_size: int, q_length: int, kv_length: int, *_: Any, mask_function: Any, device: torch.device, local_size: int | None = None, **__: Any
) -> Tensor:
    """transformers' mask interface, under `CHECKED`: a mask without contents that knows its window. ValueError where it is neither causal nor a
    sliding window."""

    def right(q: int, back: int) -> bool:
        found = bool(mask_function(*(torch.tensor(i) for i in (0, 0, q, q - back))))
        return found == (back >= 0 and (local_size is None or back < local_size))

    size = local_size or 7
    try:
        same = all(right(q, back) for q in (2 * size + 5, 3 * size + 2) for back in (-1, 0, 1, size - 1, size, size + 1))
    except IndexError:  # a mask that looks something up of each token: no more than there are
        same = all(right(q, back) for q in range(1, q_length - 1) for back in (-1, 0, 1))
    if not same:
        raise ValueError("a mask that is neither causal nor a sliding window")
    mask = torch.empty(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)
    mask.window = local_size  # type: ignore[attr-defined]
    return mask


def _attention_asked_for(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, sliding_window: int | None = None, **options: Any
) -> tuple[Tensor, None]:
    """`packed_attention`, which sees no mask, where the mask says no more than the call. ValueError where it does."""
    if attention_mask is not None:
        if not hasattr(attention_mask, "window"):
            raise ValueError("its attention wants a mask or bias of its own")
        positions = getattr(getattr(module, "config", None), "max_position_embeddings", None)
        # A window of all positions is none.
        by_mask, by_call = (
            "to the start" if size is None or (positions and size >= positions) else size for size in (attention_mask.window, sliding_window)
        )
        if by_mask != by_call:
            raise ValueError(f"its attention looks back {by_mask} by its mask, {by_call} by its call")
    return packed_attention(module, query, key, value, None, sliding_window=sliding_window, **options)


CHECKED = "rlhf_packed_checked"
ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
ALL_ATTENTION_FUNCTIONS.register(CHECKED, _attention_asked_for)
ALL_MASK_ATTENTION_FUNCTIONS.register(CHECKED, _mask_asked_for)


def pack_attention(model: nn.Module, name: str = NAME) -> None:
    """From here on the model computes packed forwards, and no others."""
    freeze(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation_internal = name  # type: ignore[attr-defined]


def obstacle(model: PreTrainedModel, interface: bool = True) -> str | None:
    """Why another attention function would not keep sequences of one row apart. interface: it is to come through transformers' interface."""
    if model._is_stateful:
        return "state-space, recurrent or linear-attention layers"
    if interface and not model._can_set_attn_implementation():
        return "its attention does not go through transformers' attention interface"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward takes no position_ids"
    mixing = [path for path, module in model.named_modules() if isinstance(module, nn.Conv1d | nn.RNNBase)]
    return f"{mixing[0]} mixes tokens outside attention" if mixing else None


def check_positions(model: nn.Module, key: str) -> None:
    """ValueError where positions do not count from 0, as RoBERTa's, whose first token stands behind the padding token's place."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and "position" in path.rpartition(".")[2]:
            raise ValueError(f"{key}: {type(model).__name__} counts positions from {module.padding_idx + 1} on, and every forward here from 0")


def check_packing(config: PretrainedConfig, key: str, trust_remote_code: bool = False) -> None:
    """ValueError that names architecture and mend if packing would compute it wrongly; tried on the meta device, before weights are loaded."""

    def refusal(why: object) -> ValueError:
        return ValueError(f"{key}: model type {config.model_type!r} cannot be trained on packed rows: {why}; set train.packing=false")

    for name in ("attn_logit_softcapping", "alibi"):
        if getattr(config, name, None):
            raise refusal(f"{name} in its attention")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16, trust_remote_code=trust_remote_code)
    check_positions(model, key)
    if why := obstacle(model):
        raise refusal(why)
    if other := set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}:
        raise refusal(f"layers of type {sorted(other)}")
    pack_attention(model, CHECKED)
    ids = torch.zeros(1, 5, dtype=torch.int64, device="meta")
    packed = pack([3, 2]).to(torch.device("meta"))
    announce(packed)
    try:
        mask = torch.ones_like(ids)  # without one, transformers would look for sequences in the positions, and add them to the mask
        model.eval()(input_ids=ids, attention_mask=mask, position_ids=packed.positions[None], use_cache=False, packed=packed)
    except Exception as error:
        raise refusal(error) from error
