from __future__ import annotations

import os
from pathlib import Path

from rlhf.distributed import World
from rlhf.engine import loading_context
from tests.helpers import run_ranks


def test_no_shared_memory_is_left_behind() -> None:
    """DeepSpeed's CPU communication leaves its buffers in /dev/shm; here their names go as soon as every rank has mapped them."""
    assert run_ranks(_buffers, 2) == [[], []]


def _buffers(world: World) -> list[str]:
    # As the launcher sets them: with all ranks on one node DeepSpeed maps buffers, whose names hold the port (nothing listens there).
    os.environ.update(LOCAL_SIZE=str(world.size), MASTER_PORT="59999")
    loading_context({"zero_optimization": {"stage": 3}}, world)
    world.barrier()
    return [p.name for p in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*_59999_*")]
