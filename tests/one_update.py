"""What one or three optimizer steps (SGD) add to the master weights of each trained model, on the devices that there are.

python -m tests.one_update MODELS OUT '{"algorithm": "ppo", ...}': a folder of `tests.helpers.build_models`, and where this rank writes its part of
the weights before and after, by role (`tests.helpers.save_state`). The settings are the fields of `Update`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rlhf.config import ROOT
from rlhf.distributed import init_world
from rlhf.models.lora import weight_layout
from rlhf.ops import fused, head
from tests.distributed.steps import experience_of, open_models, update
from tests.distributed.test_invariance import ALGORITHMS, FORWARDS, TEMPERATURE, data
from tests.e2e.programs import free_port
from tests.helpers import rl_config, save_state, saved_state
from tests.interpreter import interpreted

# Of one step the rate does not matter but for rounding. Of several it is so small that what the first has rounded hardly shows in the gradients of
# the next, and that no ratio comes near to being clipped.
RATES = {1: 1.0, 3: 0.001}


@dataclass(frozen=True)
class Update:
    algorithm: str
    forwards: str
    dtype: str = "bfloat16"
    checkpointing: Any = False
    lora: int = 0
    ranks: int = 1
    lend: bool = False  # the actor computes on the rollout's weights
    compile: bool = False
    minibatches: int = 3  # optimizer steps
    interpreted: bool = False  # what a GPU would compute in kernels is computed in them, by Triton's interpreter


# With how far any tensor may be off after three steps: in bfloat16 about twice as far as measured in Triton's interpreter, in float32 as
# TensorFloat-32 would not be.
UPDATES: dict[str, tuple[Update, float]] = {
    "float32": (Update("ppo", "packed", "float32"), 3e-4),
    "ppo": (Update("ppo", "packed", checkpointing="mlp"), 0.5),
    "two ranks, lent": (Update("ppo", "packed", checkpointing="mlp", ranks=2, lend=True), 0.5),
    "LoRA": (Update("dr_grpo", "tokens", lora=4), 0.3),
    "grpo": (Update("grpo", "padded", checkpointing=True), 0.15),
}


def interpret() -> None:
    interpreted()
    fused._in_kernels = lambda *tensors: all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in tensors)  # not on the meta device
    head._in_kernels = lambda logits: logits.device.type == "cpu"


def main(models: Path, out: Path, wanted: Update) -> None:
    if wanted.interpreted:
        interpret()
    world = init_world()
    role = {
        "dtype": wanted.dtype,
        "gradient_checkpointing": wanted.checkpointing,
        "compile": wanted.compile,
        "learning_rate": RATES[wanted.minibatches],
    }
    config = rl_config(
        models,
        3,
        actor={**role, "lora": {"r": wanted.lora, "target_modules": "all-linear"} if wanted.lora else None},
        critic={**role, "init": "path", "path": models / "scalar", "head": "keep"},
        reference={"path": models / "reference", "dtype": wanted.dtype},
        algorithm={**ALGORITHMS[wanted.algorithm], "minibatches": wanted.minibatches},
        rollout={"prompts": 5, "group_size": 3, "max_new_tokens": 12, "temperature": TEMPERATURE},
        train={"micro_batch": 4 // wanted.ranks, **FORWARDS[wanted.forwards]},
    )
    held, run = open_models(config, world)
    if wanted.lend:
        held.actor.hand_over(weight_layout(held.actor.module), held.hybrid_engine, lend=True)
    for name, engine in held.engines.items():
        save_state(engine, out / name / "before")
    update(held, run, experience_of(held, run, *data()))
    for name, engine in held.engines.items():
        save_state(engine, out / name / "after")
    world.close()


def start(models: Path, out: Path, wanted: Update, on_gpu: bool) -> list[subprocess.Popen[str]]:
    """A process for each rank."""
    shared = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": str(int(wanted.interpreted)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"WORLD_SIZE": str(wanted.ranks), "LOCAL_WORLD_SIZE": str(wanted.ranks)}
    shared["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(wanted.ranks))) if on_gpu else ""
    command = [sys.executable, "-m", "tests.one_update", str(models), str(out), json.dumps(asdict(wanted))]
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(wanted.ranks)
    ]


def differences(models: Path, folder: Path, wanted: Update) -> tuple[dict[str, float], dict[str, float]]:
    """Of such an update, on GPUs or interpreted, from the same on one CPU rank in float32 without kernels: |difference| / |update| of every tensor,
    by role and name; and of all of a role's together, by role."""
    plain = replace(wanted, dtype="float32", ranks=1, lend=False, compile=False, interpreted=False)
    started = [(folder / "plain", start(models, folder / "plain", plain, False))]
    started.append((folder / "wanted", start(models, folder / "wanted", wanted, not wanted.interpreted)))
    added: list[dict[str, torch.Tensor]] = []
    for out, ranks in started:
        for process in ranks:
            said = process.communicate(timeout=300)[1]
            assert process.returncode == 0, said[-3000:]
        added.append({})
        for role in sorted(path.name for path in out.iterdir()):
            before, after = (saved_state(out / role / when)[0] for when in ("before", "after"))
            added[-1] |= {f"{role}: {name}": after[name].float() - before[name].float() for name in before if name.startswith("weight/")}
    expected, found = added
    assert expected and expected.keys() == found.keys(), sorted(expected.keys() ^ found.keys())
    roles = {name.split(":")[0] for name in expected}
    together = {
        role: tuple(torch.cat([update[name].flatten() for name in expected if name.startswith(role)]) for update in (found, expected))
        for role in roles
    }
    return (
        {name: float((found[name] - tensor).norm() / tensor.norm()) for name, tensor in expected.items()},
        {role: float((one - other).norm() / other.norm()) for role, (one, other) in together.items()},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Update(**json.loads(sys.argv[3])))
