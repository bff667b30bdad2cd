"""Before the first step: do the largest forward and backward passes fit? If not on any rank, all agree on a smaller budget.

What computes is a stand-in: the role's own architecture, adapters and kernels, with one layer's weights in the place of all layers'. It keeps the
same activations as the model, byte for byte, and has no part in the training: no gradient, optimizer state, random number or ZeRO bookkeeping is
touched, so training is the same bits with and without it. And it knows no collective: a rank that runs out of memory inside the real model would
leave the others waiting there for good. Beside it lies a tensor as large as what the plan says is still to come (moments, the rollout's cache).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from rlhf.budget import smaller, with_value, write_budget
from rlhf.config import Config, TrainedModelConfig
from rlhf.memory import blank_model, is_out_of_memory, largest_forward
from rlhf.models.checkpointing import decoder_layers, recompute
from rlhf.models.compiling import compile_layers
from rlhf.models.loading import model_dtype, read_architecture, without_dropout
from rlhf.models.packing import pack_attention
from rlhf.models.scoring_head import fuse_head
from rlhf.preflight import roles
from rlhf.trainers.run import Run

Loss = Callable[[nn.Module, list[int], Config], Tensor]  # of a forward over rows of these lengths


def fit_budget(run: Run, losses: Mapping[str, Loss]) -> None:
    """Try the update of each trained role (`losses` by its name); `run.config` then has the budget that all ranks have room for, or the smallest:
    what the plan expects may be too much, and whether it was shows in the first step. (collective)"""
    while True:
        failed = next((f"update_{name}" for name, loss in losses.items() if not fits(run, name, loss)), None)
        found = [phase for phase in run.world.gather_objects(failed) if phase]  # (collective)
        if not found:
            return
        try:
            key, value = smaller(run.config, found[0], run.longest, run.plan.cache is not None)
        except ValueError as error:
            run.console.message(f"the plan of the memory leaves no room for {found[0]}: {error}")
            return
        run.config = with_value(run.config, key, value)
        if run.world.is_main:
            write_budget(run.config.run_dir, 0, key, value)
        run.console.message(f"{found[0]} does not fit on {len(found)} of {run.world.size} ranks: going on with {key}={value}")
        run.expect(run.longest)


def fits(run: Run, name: str, loss: Loss) -> bool:
    """Whether this rank has room for the largest update of a role. No collective."""
    try:
        with torch.random.fork_rng(devices=[run.world.device] if run.on_gpu else []):  # what a checkpoint has restored goes on as it was
            _try(run, name, loss)
        done = True
    except Exception as error:  # a stand-in that cannot be made says nothing about memory, and is no reason not to train
        done = not is_out_of_memory(error)
        if done:
            run.console.message(f"{name}: memory was not tried before the first step: {error}")
    gc.collect()  # outside of the handler: the error holds the frames, and with them the tensors
    if run.on_gpu:
        torch.cuda.empty_cache()
    return done


def _try(run: Run, name: str, loss: Loss) -> None:
    config, device = run.config, run.world.device
    role = next(role for key, role in roles(config) if key == name)
    assert isinstance(role, TrainedModelConfig)
    module = stand_in(role, name, config.train.packing, model_dtype(role, device), device)
    ahead = _still_to_come(run, name) - sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)  # its gradients
    _reserve = torch.empty(max(0, int(ahead)), dtype=torch.uint8, device=device)
    loss(module, worst_rows(config, run.longest), config).backward()


def _still_to_come(run: Run, name: str) -> float:
    """Bytes that the plan has in the update beside activations, or what comes when they are gone, and that are not there yet; 0 on CPU."""
    items = run.plan.phases.get(f"update_{name}", {})
    if not run.on_gpu or not items:
        return 0.0
    free, total = torch.cuda.mem_get_info()
    passing = [f"{name}: {item}" for item in ("activations", "backward", "step")]
    used = total - free - (torch.cuda.memory_reserved() - torch.cuda.memory_allocated()) - run.meter.others
    return sum(value for item, value in items.items() if item not in passing) - used


def stand_in(role: TrainedModelConfig, name: str, packing: bool, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model of the role's architecture, contents undefined, whose layers are all the first one."""
    module = blank_model(role, without_dropout(read_architecture(role, name)), name != "actor", dtype)
    layers = decoder_layers(module)
    for i in range(1, len(layers)):
        layers[i] = layers[0]
    module.to_empty(device=device)
    if packing:
        pack_attention(module)
    plain: nn.Module = module.get_base_model() if role.lora else module  # type: ignore[operator]
    fuse_head(plain)
    if role.compile:
        compile_layers(module)
    recompute(plain, role.recomputed, name)
    return module.train()


def worst_rows(config: Config, longest: int) -> list[int]:
    """Lengths of the rows of the largest forward: as long as they can be, and the rest of a budget of tokens. An even number of them for pairs."""
    tokens = largest_forward(config, longest)
    rest = [tokens % longest] if tokens % longest > 1 else []
    lengths = [longest] * (tokens // longest) + rest
    return lengths if config.task != "reward_model" or len(lengths) % 2 == 0 else [*lengths[:-1], *_halves(lengths[-1])]


def _halves(length: int) -> list[int]:
    return [length - length // 2, length // 2]
