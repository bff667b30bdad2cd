"""What must be the same on all ranks is compared, under every ZeRO stage, and who differs is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf.config import role_settings
from rlhf.distributed import World
from rlhf.engine import TrainEngine, loading_context
from rlhf.models.loading import load_causal_lm
from rlhf.ranks import check_agreement
from tests.helpers import rl_config, run_ranks


def _astray(world: World, models: Path, stage: int) -> list[str]:
    config = rl_config(models, stage)
    settings = role_settings(config, config.actor, world_size=world.size, on_gpu=False)
    settings["zero_optimization"].pop("stage3_param_persistence_threshold", None)  # norms stay whole then
    module = load_causal_lm(config.actor, "actor", loading_context(settings, world), world, torch.float32)
    engine = TrainEngine(module, config.actor, settings, world, 1, 0, "actor")
    ids = torch.arange(4, 12)[None] + world.rank
    for _ in range(2):
        engine.backward(engine(input_ids=ids).logits.square().sum(), 1000)
        engine.step()
    check_agreement(engine.replicated(), "after step 2", world)
    said = [f"{len(engine.replicated())} items"]
    if world.rank == 1:
        with torch.no_grad():
            next(p for n, p in engine.module.named_parameters() if n.endswith("input_layernorm.weight")).data[3] += 1e-6
    with pytest.raises(RuntimeError) as weights:
        check_agreement(engine.replicated(), "after step 3", world)
    engine.backward_passes += world.rank
    with pytest.raises(RuntimeError) as passes:
        check_agreement({"passes": engine.backward_passes}, "after step 4", world)
    return [*said, str(weights.value), str(passes.value)]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_astray(models: Path, stage: int) -> None:
    found = run_ranks(_astray, 2, models, stage)
    assert found[0] == found[1]
    items, weights, passes = found[0]
    assert int(items.split()[0]) > (5 if stage == 3 else 20)
    assert weights.startswith("the ranks are not in the same state after step 3: weights of ") and weights.count("input_layernorm.weight") == 1
    assert "on rank 0 (host" in weights and "on rank 1 (host" in weights
    assert passes.startswith("the ranks are not in the same state after step 4: passes is 2 on rank 0 (host") and ", 3 on rank 1 (host" in passes
