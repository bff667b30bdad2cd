"""Times saving and resuming a trained model of random weights, under ZeRO-3, with its optimizer states.

    deepspeed --num_gpus 2 scripts/bench_checkpoint.py --shape 7B --folder /scratch

JSON lines from rank 0. save: seconds until everything is on disk (fsynced) with its digests. resume: seconds to check every digest and to load.
background, with what rank 0 exports: seconds until training goes on, seconds until all is on disk, and the share of these that updates alone would
not have taken.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from rlhf.checkpoint import Checkpoints, Export, Mark
from rlhf.distributed import World, init_world
from rlhf.files import Written
from rlhf.metrics import PhaseTimer
from rlhf.models.export import on_host, write_shards
from rlhf.models.lora import weight_layout
from rlhf.state import Copy
from rlhf.trainers.rl import Models, learn
from rlhf.types import Prompt, Rollout, Scores
from scripts import bench_step
from scripts.workloads import SHAPES


def drawn(rows: int, tokens: int, vocabulary: int) -> Rollout:
    """Rows of 16 prompt tokens and a response each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, vocabulary - 1, (rows, tokens), generator=generator)
    lengths = torch.full((rows,), tokens - 16)
    prompts = [Prompt(row[:16].tolist(), "", "bench") for row in ids]
    return Rollout(
        prompts, torch.arange(rows), torch.zeros(rows).long(), ids, torch.full((rows,), 16), lengths, torch.ones(rows).bool(),
        torch.zeros(rows, tokens - 16),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5B")
    parser.add_argument("--rows", type=int, default=32, help="of 1,024 tokens, in an update")
    parser.add_argument("--folder", type=Path, required=True, help="on the disk that is to be measured; emptied")
    parser.add_argument("--only", choices=("save", "background"))
    parser.add_argument("--local_rank", type=int, default=0)
    arguments = parser.parse_args()
    args = bench_step.arguments().parse_args(["--shape", arguments.shape, "--no_reference", "--tokens", "8192"])
    world = init_world()
    config = bench_step.recipe(args)
    models = bench_step.build(args, config, world)
    timer = PhaseTimer(torch.cuda.synchronize if world.device.type == "cuda" else None)
    rollout = drawn(arguments.rows, 1024, SHAPES[arguments.shape].vocabulary)
    folder = arguments.folder / "bench_checkpoint"
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    world.barrier()

    def update(step: int) -> float:
        generator = torch.Generator().manual_seed(step)
        scores = Scores(torch.randn(len(rollout), generator=generator), torch.ones(len(rollout), dtype=torch.bool), {}, {})
        world.barrier()
        started = time.perf_counter()
        learn(models, config, timer, rollout, lambda: scores, step, 0.0, world)
        return time.perf_counter() - started

    update(1)
    usual = sorted(update(step) for step in range(2, 5))[1]
    report(world, "update", usual, arguments.shape)
    if arguments.only != "background":
        measure_save(world, models, folder, arguments.shape)
    if arguments.only != "save":
        measure_background(world, models, folder, arguments.shape, update, usual)
    world.close()


def measure_save(world: World, models: Models, folder: Path, shape: str) -> None:
    plain = Checkpoints(folder, world, keep_last=1)
    started = time.perf_counter()
    problem = plain.save(Mark(1), models.engines, {})
    seconds = time.perf_counter() - started
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink()) / 1e9
    report(world, "save", seconds, shape, gb=round(size, 2), problem=problem)

    started = time.perf_counter()
    found, _ = plain.find("auto")
    checked = time.perf_counter() - started
    assert found is not None
    plain.load(found, models.engines)
    report(world, "resume", time.perf_counter() - started, shape, checked=round(checked, 3))

    if world.is_main:
        shutil.rmtree(folder)  # room for the next one
    world.barrier()


def measure_background(world: World, models: Models, folder: Path, shape: str, update: Callable[[int], float], usual: float) -> None:
    behind = Checkpoints(folder, world, keep_last=1, background=True)
    layout = weight_layout(models.actor.module)

    def exporter(copy: Copy) -> Export | None:
        weights = on_host(models.actor.full_tensors(layout), world.is_main, copy)
        return (lambda folder: write(folder, weights)) if world.is_main else None

    def write(folder: Path, weights: dict[str, Tensor]) -> dict[Path, Written]:
        (folder / "hf").mkdir()
        return write_shards(folder / "hf", weights)

    started = time.perf_counter()
    behind.prepare(models.engines, sum(2 * getattr(p, "ds_numel", p.numel()) for p in models.actor.module.parameters()))
    beside = []
    while world.most(int(behind.pinned is not None and behind.pinned.preparing)):
        beside.append(update(100 + len(beside)))
    slowest = round(max(beside, default=0.0), 3)
    report(world, "locking host memory", time.perf_counter() - started, shape, updates=len(beside), slowest_update=slowest)
    for attempt in ("first", "second"):
        started = time.perf_counter()
        problem = behind.save(Mark(2), models.engines, {}, exporter=exporter)
        gone_on = time.perf_counter() - started
        updates = 0
        while world.most(int(behind.writing)):
            update(10 + updates)
            updates += 1
        whole = time.perf_counter() - started
        problem = problem or behind.finish()
        stalled = round((whole - updates * usual) / whole, 4)
        report(world, f"background, {attempt}", gone_on, shape, until_on_disk=round(whole, 2), updates=updates, stalled=stalled, problem=problem)
        if world.is_main:
            shutil.rmtree(folder)
        world.barrier()


def report(world: World, case: str, seconds: float, shape: str, **more: object) -> None:
    if world.is_main:
        line = {"bench": "checkpoint", "case": f"{shape} on {world.size}, {case}", "metric": "seconds", "value": round(seconds, 3), **more}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
