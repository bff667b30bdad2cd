"""What one optimizer step (SGD, rate 1) of each trained model adds to its master weights, on the device that there is.

python -m tests.one_update MODELS OUT ALGORITHM DTYPE FORWARDS CHECKPOINTING LORA [interpreted]: a folder of `tests.helpers.build_models`, a file for
{role: [n] float32}; LORA: rank, 0 for none. interpreted: what a GPU would compute in kernels is computed in them, by Triton's interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from rlhf.config import ROOT
from rlhf.distributed import init_world
from rlhf.ops import fused, head
from tests.distributed.steps import experience_of, open_models, update
from tests.distributed.test_invariance import ALGORITHMS, FORWARDS, TEMPERATURE, data
from tests.e2e.programs import free_port
from tests.helpers import rl_config
from tests.interpreter import interpreted


def interpret() -> None:
    interpreted()
    fused._in_kernels = lambda *tensors: all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in tensors)  # not on the meta device
    head._in_kernels = lambda logits: logits.device.type == "cpu"


def main(models: Path, out: Path, algorithm: str, dtype: str, forwards: str, checkpointing: str, lora: str, *how: str) -> None:
    if how:
        interpret()
    world = init_world()
    role = {"dtype": dtype, "gradient_checkpointing": {"false": False, "true": True}.get(checkpointing, checkpointing)}
    config = rl_config(
        models,
        3,
        actor={**role, "lora": {"r": int(lora), "target_modules": "all-linear"} if int(lora) else None},
        critic={**role, "init": "path", "path": models / "scalar", "head": "keep"},
        reference={"path": models / "reference", "dtype": dtype},
        algorithm=ALGORITHMS[algorithm],
        rollout={"prompts": 5, "group_size": 3, "max_new_tokens": 12, "temperature": TEMPERATURE},
        train={"micro_batch": 4, **FORWARDS[forwards]},
    )
    held, run = open_models(config, world)

    def masters() -> dict[str, torch.Tensor]:
        return {name: torch.cat(engine._engine.optimizer.fp32_partitioned_groups_flat).cpu() for name, engine in held.engines.items()}

    before = masters()
    update(held, run, experience_of(held, run, *data()))
    torch.save({name: (after - before[name]).detach() for name, after in masters().items()}, out)
    world.close()


def difference(models: Path, folder: Path, algorithm: str, dtype: str, forwards: str, checkpointing: str, lora: int, *how: str) -> dict[str, float]:
    """Of such an update from the same in float32 on the CPU without kernels, by role: |difference| / |update|."""
    started, found = [], []
    for i, (precision, extra, devices) in enumerate((("float32", (), ""), (dtype, how, "" if how else "0"))):
        command = [sys.executable, "-m", "tests.one_update", models, folder / str(i), algorithm, precision, forwards, checkpointing, lora, *extra]
        env = os.environ | {"CUDA_VISIBLE_DEVICES": devices, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1" if how else "0"}
        env |= {"MASTER_PORT": str(free_port())}
        started.append(subprocess.Popen([*map(str, command)], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    for i, process in enumerate(started):
        said = process.communicate(timeout=200)[1]
        assert process.returncode == 0, said[-3000:]
        found.append(torch.load(folder / str(i)))
    return {role: float((found[1][role] - expected).norm() / expected.norm()) for role, expected in found[0].items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
