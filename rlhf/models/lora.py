"""LoRA through peft: adapters on the training model, the reference = adapters off, merged weights for rollouts and export."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rlhf.config import LoraConfig
from rlhf.models.heads import ScalarModel

# peft asks transformers for an attribute by its old name: nothing that a user could mend.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def add_adapters(module: nn.Module, config: LoraConfig, seed: int) -> nn.Module:
    """The module with adapters on; the same initial values on every rank. A scalar head keeps training whole."""
    torch.manual_seed(seed)
    scalar = isinstance(module, ScalarModel)
    peft_config = PeftLoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        exclude_modules=["score"] if scalar else None,
        modules_to_save=None,
        task_type=None if scalar else "CAUSAL_LM",
    )
    try:
        wrapped: nn.Module = get_peft_model(module, peft_config)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"lora.target_modules={config.target_modules}: {error}") from None
    _check_targets(module, config)
    if scalar:
        for parameter in module.score.parameters():  # type: ignore[union-attr]
            parameter.requires_grad_(True)
    return wrapped


def _check_targets(module: nn.Module, config: LoraConfig) -> None:
    """Raises ValueError for adapters that cannot be merged: on an embedding, or on a weight that another module shares (tied, trap 33)."""
    owners: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.replace(".base_layer.", "."))
    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            names = owners[id(layer.get_base_layer().weight)]
            if not layer.lora_A:
                raise ValueError(f"lora.target_modules={config.target_modules}: {names[0]} is no linear layer; leave it out")
            if len(names) > 1:
                raise ValueError(f"lora.target_modules={config.target_modules}: {' and '.join(names)} are one tied weight; leave it out")


def adapters_off(module: nn.Module) -> AbstractContextManager[None]:
    """Within it the model computes as its frozen base does (trap 14)."""
    assert isinstance(module, PeftModel)
    context: AbstractContextManager[None] = module.disable_adapter()
    return context


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

    def merge_into(self, base: Tensor, a: Tensor, b: Tensor) -> None:
        """base += scale * B @ A, in place, where `base` is a copy of the weight; rounded once.

        A half-precision base takes float32 adapters as two halves each (Markidis et al. 2018, arXiv:1803.04014: hi hi + hi lo + lo hi), so that the
        tensor cores multiply them, and what is lost is far below the one rounding.
        """
        if base.dtype == torch.bfloat16:
            if a.dtype == torch.float32:
                a_high, b_high = a.bfloat16(), b.bfloat16()
                a = torch.cat((a_high, a_high, (a - a_high).bfloat16()))
                b = torch.cat((b_high, (b - b_high).bfloat16(), b_high), 1)
            left, right = (a.t(), b.t()) if self.transposed else (b, a)
            base.addmm_(left, right, alpha=self.scale)  # accumulates in float32, and adds before it rounds
            return
        base.copy_(base.float() + self.update(a, b))


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
