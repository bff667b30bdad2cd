"""Ranks, collectives and the waiting between phases: the one place that calls torch.distributed."""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.requests import Requests
from rlhf.watchdog import Process, Watchdog, in_time

T = TypeVar("T")

JOIN_SECONDS = 60.0  # at least: imports take long on a slow disk
EXIT_BAD = 77  # numbers that stay bad: another start would come to the same end
EXIT_AGAIN = 75  # "start me again": memory ran out, and the run folder holds a smaller budget (EX_TEMPFAIL of sysexits.h)


@dataclass
class World:
    """This process among all. Every method marked (collective) must be called by all ranks in the same order."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    store: dist.Store | None = None
    watchdog: Watchdog = field(default_factory=Watchdog)
    requests: Requests = field(default_factory=Requests)
    processes: Sequence[Process] = ()  # of all ranks
    waited: float = 0.0  # seconds for others: in `wait_for_all`, and on CPU in collectives
    _meetings: int = field(default=0, repr=False)
    _queues: int = field(default=0, repr=False)
    _left: str | None = field(default=None, repr=False)
    _exchanges: Counter[str] = field(default_factory=Counter, repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """(collective)"""
        if self.size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def global_sum(self, values: dict[str, float]) -> dict[str, float]:
        """Sums over all ranks, in float64; the keys must agree. (collective)"""
        if self.size == 1 or not values:
            return dict(values)
        names = sorted(values)
        tensor = torch.tensor([values[n] for n in names], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return dict(zip(names, tensor.tolist(), strict=True))

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in the tensor's dtype. (collective)"""
        if self.size == 1:
            return tensor
        moved = tensor.to(self.device)
        dist.all_reduce(moved)
        return moved.to(tensor.device)

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank; for small things. (collective)"""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def broadcast_object(self, value: T) -> T:
        """Rank 0's value on every rank. (collective)"""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def gather_rows(self, rows: Tensor, pad: float = 0) -> Tensor:
        """Rows of all ranks under each other: [n, w] with any n and w per rank -> [sum n, max w] on the host. (collective)"""
        rows = rows.cpu()
        if self.size == 1:
            return rows
        shape = torch.zeros(self.size, 2, dtype=torch.int64, device=self.device)
        shape[self.rank] = torch.tensor([rows.shape[0], rows.shape[1]])
        dist.all_reduce(shape)
        counts, width = shape[:, 0].tolist(), int(shape[:, 1].max())
        sent = torch.full((max(counts), width), pad, dtype=rows.dtype, device=self.device)
        sent[: rows.shape[0], : rows.shape[1]] = rows.to(self.device)
        received = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(received, sent)
        return torch.cat([part[:n].cpu() for part, n in zip(received, counts, strict=True)])

    def gather_indexed(self, rows: list[int], values: Tensor, total: int) -> Tensor:
        """[total, w]: row `rows[i]` of the result is `values[i]` of the rank that computed it. (collective)"""
        index = self.gather_rows(torch.tensor(rows, dtype=torch.int64).reshape(-1, 1), pad=-1).squeeze(1)
        gathered = self.gather_rows(values)
        result = torch.zeros(total, gathered.shape[1], dtype=gathered.dtype)
        result[index] = gathered
        return result

    def gather_shards(self, pairs: Sequence[tuple[Tensor, Tensor]], ready: Callable[[range], None] = lambda indices: None) -> Iterator[range]:
        """For each (whole [size * n], shard [n]): all ranks' shards, one behind the other, straight into `whole`. (collective)

        A shard may be this rank's place in `whole`. ready: puts the shards of these pairs there, on the current stream, just before they leave.
        Everything is under way on return; yields indices of `pairs` in groups, each once the current stream is made to wait for it, the host never.
        """
        if self.device.type == "cpu" or not pairs:
            ready(range(len(pairs)))
            for whole, shard in pairs:
                dist.all_gather_into_tensor(whole, shard)
            return iter([range(len(pairs))])
        groups: list[tuple[range, Any]] = []
        begin = size = 0
        for i, (whole, _) in enumerate(pairs):  # many tensors to one launch: a small one alone does not fill the link
            size += whole.numel() * whole.element_size()
            if size >= 1 << 30 or i == len(pairs) - 1:
                ready(range(begin, i + 1))
                with dist._coalescing_manager(device=self.device, async_ops=True) as work:
                    for out, part in pairs[begin : i + 1]:
                        dist.all_gather_into_tensor(out, part, async_op=True)
                groups.append((range(begin, i + 1), work))
                begin, size = i + 1, 0
        return self._as_they_arrive(groups, pairs)

    @staticmethod
    def _as_they_arrive(groups: list[tuple[range, Any]], pairs: Any) -> Iterator[range]:
        """Holds `pairs`, whose memory the transfers use, until the last has arrived."""
        for indices, work in groups:
            work.wait()
            yield indices

    def beat(self) -> None:
        """This rank makes progress; no more than a count."""
        self.watchdog.beats += 1

    def shared_queue(self, length: int) -> Callable[[], int | None]:
        """A queue of 0, 1, ..., length - 1 that all ranks pull from, each number once; on the store, no collective. All ranks make it.

        Shuffled, always in the same way: ranks that pull in turn would share out what alternates in the data as badly as can be."""
        self._queues += 1
        key, store, served = f"queue/{self._queues}", self.store, iter(range(length))
        if store is None:
            return lambda: next(served, None)
        order = np.random.default_rng(length).permutation(length).tolist()

        def take() -> int | None:
            number = store.add(key, 1) - 1
            return order[number] if number < length else None

        return take

    def fair_queue(self, prompts: int, group: int) -> dict[str, Any]:
        """How `generate` shares `prompts` groups of `group` rows out by queue: {take, most, share}. A rank has no more rows in flight than an even
        share. Fewer would leave more to whoever is done first, but late starters end late: simulated with the step times of a 0.5B model, a limit of
        three quarters takes 4 % longer over spread lengths, 15 % over half long ones, 44 % over equal ones. All ranks make it."""
        share = -(-prompts // self.size)
        return {"take": self.shared_queue(prompts), "most": share * group, "share": share}

    def wait_for_all(self, phase: str, poll: float = 0.002) -> None:
        """Wait until every rank has arrived here, on the store: no collective, so no collective's timeout, however uneven the ranks are."""
        if self.store is None:
            return
        self._meetings += 1
        keys = [f"{phase}/{self._meetings}/{r}" for r in range(self.size)]
        self.store.set(keys[self.rank], "here")
        start = time.perf_counter()
        with self.watchdog.waiting():
            missing = list(range(self.size))
            while missing := [r for r in missing if not self.store.check([keys[r]])]:
                time.sleep(poll)
                poll = min(poll * 1.5, 0.1)
        self.waited += time.perf_counter() - start
        # Everybody is here, so everybody has left the meeting before: nobody will look at its key again.
        if self._left is not None:
            self.store.delete_key(self._left)
        self._left = keys[self.rank]

    def exchange(self, topic: str, value: str) -> list[str]:
        """Every rank's value, in rank order, on every rank. Over the store, from any thread, and no collective: but the n-th call for a topic on
        one rank belongs to the n-th on every other. From the main thread this rank is known to wait: else the rank that it waits for is not told
        from it, and the processor time of its looking counts as progress (`watchdog.HOST_WORK`)."""
        if self.store is None:
            return [value]
        self._exchanges[topic] += 1
        keys = [f"{topic}/{self._exchanges[topic]}/{r}" for r in range(self.size)]
        self.store.set(keys[self.rank], value)
        found = []
        with self.watchdog.waiting() if threading.current_thread() is threading.main_thread() else contextlib.nullcontext():
            for each in keys:
                while not self.store.check([each]):
                    time.sleep(0.01)
                found.append(self.store.get(each).decode())
        # Everybody has begun this exchange, so everybody has what the one before was for.
        self.store.delete_key(f"{topic}/{self._exchanges[topic] - 1}/{self.rank}")
        return found

    def most(self, value: int) -> int:
        """The largest of all ranks' values; on the host, so that no device is waited for. (collective)"""
        if self.size == 1:
            return value
        tensor = torch.tensor([value])
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def watch(self, folder: Path | None = None, stall: float | None = None) -> None:
        """Start the watchdog: `Watchdog.start`. (collective)"""

        def processes(own: Process) -> Sequence[Process]:
            self.processes = self.gather_objects(own)
            return self.processes

        self.watchdog.start(self.store, processes, collectives_begun, folder, stall)

    def end_all(self, code: int) -> None:
        """`Watchdog.end_all`."""
        self.watchdog.end_all(code)

    def close(self) -> None:
        self.watchdog.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def collectives_begun() -> int:
    """By this process, in all groups. Read by a thread; nothing waits."""
    count = 0
    for group in list(dist.distributed_c10d._world.pg_names):
        for device in group._device_types:
            with contextlib.suppress(RuntimeError):  # a group that has none yet
                count += group._get_backend(device)._get_sequence_number_for_group()
    return count


def _time_waits(world: World) -> None:
    """On CPU whoever waits for a collective does so in `Work.wait`, DeepSpeed too; on a GPU the device waits, not the host."""
    wait = dist.Work.wait

    def timed(work: dist.Work, *arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return wait(work, *arguments, **named)
        finally:
            world.waited += time.perf_counter() - start

    dist.Work.wait = timed  # type: ignore[method-assign]


def launch_environment() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, ranks on this node) from deepspeed, torchrun, accelerate or srun; (0, 1, 0, 1) if none started us."""
    env = os.environ
    # The variables of the step, which only srun sets: those of the job are there too in a batch script that starts one process.
    if "RANK" not in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in env:
        env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"], env["SLURM_LOCALID"]
        env.setdefault("LOCAL_WORLD_SIZE", env.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0])  # "4(x2)": four on two nodes
        env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
        if "MASTER_ADDR" not in env:
            raise ValueError("started by srun: export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1) first")
    rank, size, local = (int(env.get(k, d)) for k, d in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    return rank, size, local, int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", "1" if size == 1 else "0"))) or size


def init_world(
    threads: int | None = None,
    init_method: str | None = None,
    folder: Path | None = None,
    stall: float | None = None,
    requests: Requests | None = None,
) -> World:
    """Join the process group (NCCL on GPUs, gloo on CPU) that the launcher's environment describes, and watch it (`World.watch`)."""
    rank, size, local_rank, local_size = launch_environment()
    if torch.cuda.is_available():
        # The KV cache grows by a little every decode step: without this each growth is a new device allocation (rollouts 1.5x slower, H100).
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)  # before the group exists, or NCCL refuses the first collective
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # A fixed thread count: the number of threads decides the order of sums, hence bits.
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_size))
    # DeepSpeed takes LOCAL_RANK for the device: where every rank sees only its own GPU (srun --gpus-per-task=1), that is 0.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank if device.index is None else device.index))
    if not dist.is_initialized():
        timeout = datetime.timedelta(minutes=float(os.environ.get("DEEPSPEED_TIMEOUT", "30")))
        if size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            with in_time(stall and max(stall, JOIN_SECONDS), rank, f"not all {size} ranks have joined"):
                dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=size, timeout=timeout)
    world = World(rank, size, local_rank, local_size, device, watchdog=Watchdog(rank), requests=requests or Requests())
    if size > 1:
        world.store = _own_store(world)
    if device.type == "cpu":
        _time_waits(world)
    world.watch(folder, stall)
    return world


def _own_store(world: World) -> dist.Store:
    """A store of our own beside the group's (whose handle is not public): rank 0 serves it on a free port."""
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    timeout = datetime.timedelta(minutes=5)
    port = 0
    server: dist.Store | None = None
    if world.is_main:
        tcp = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        server, port = tcp, tcp.port
    port = world.broadcast_object(port)
    return server or dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)


def device_names() -> Sequence[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
