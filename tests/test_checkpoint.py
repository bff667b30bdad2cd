"""A checkpoint is whole or it is none, whatever a disk does and whenever a kill comes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf import checkpoint, files
from rlhf.checkpoint import Checkpoints, Failure, Mark, damage
from rlhf.distributed import World
from rlhf.models.export import on_host
from rlhf.state import Part, PinnedCopies, TensorFile, begin, copy_to_host, to_come
from rlhf.trainers.rl import memory_to_come
from rlhf.trainers.run import Best, Run
from tests.helpers import run_ranks, single_world


class Engine:
    """One tensor as all its state."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = torch.full((3,), value)

    def state_bytes(self) -> int:
        return self.value.nbytes

    def state_files(self, copy: Callable[[Tensor], Tensor] = copy_to_host) -> Iterator[TensorFile]:
        yield TensorFile("rank-0-000.safetensors", {"value": copy(self.value)}, {"state": "{}"})

    def hold(self, until: torch.cuda.Event) -> None:
        raise AssertionError("without a GPU nothing is copied behind the host's back")

    def load(self, folder: Path) -> None:
        self.value = load_file(folder / "rank-0-000.safetensors")["value"]


def export(folder: Path) -> dict[Path, files.Written]:
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")
    return {folder / "hf" / "model": files.write_text(folder / "hf" / "model", "weights")}


def save(checkpoints: Checkpoints, step: int, best: tuple[int, ...] = (), part: int = 0) -> Failure | None:
    progress = TensorFile("step.safetensors", {"turns": torch.tensor(part)}, {}) if part else None
    return checkpoints.save(Mark(step, part), {"actor": Engine(step)}, {"note": step}, best, None if part else lambda copy: export, progress)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def assert_usable(run_dir: Path, steps: tuple[int, ...]) -> int:
    """A start afterwards finds one of these checkpoints, whole; which one."""
    checkpoints, engine = Checkpoints(run_dir, single_world(), keep_last=2), Engine()
    found, _ = checkpoints.find("auto")
    assert found is not None
    state = checkpoints.load(found, {"actor": engine})
    assert state["step"] in steps and state["note"] == state["step"]
    assert engine.value.tolist() == [state["step"]] * 3
    assert not [name for name in names(run_dir / "checkpoints") if name.startswith(".")]
    return int(state["step"])


# --------------------------------------------------------------------------------------------------------------------------
# Which are kept, and which is found


def test_resume_from_an_older_checkpoint_sets_the_later_ones_aside(tmp_path: Path) -> None:
    checkpoints, engine = Checkpoints(tmp_path, single_world(), keep_last=2), Engine()
    for step in (8, 10, 12):
        assert save(checkpoints, step, best=(8,)) is None
    assert names(tmp_path / "checkpoints") == ["best", "checkpoint-10", "checkpoint-12", "checkpoint-8", "latest"]

    found, _ = checkpoints.find(str(tmp_path / "checkpoints" / "checkpoint-8"))
    assert "checkpoint-12" in names(tmp_path / "checkpoints"), "the start may still be refused"
    checkpoints.go_on_from(found)
    assert found is not None and checkpoints.load(found, {"actor": engine})["step"] == 8
    assert names(tmp_path / "checkpoints") == ["best", "checkpoint-8"]
    assert names(tmp_path / "checkpoints-1") == ["checkpoint-10", "checkpoint-12", "latest"]

    # The new history: its checkpoint stays, and is what `auto` finds.
    save(checkpoints, 9, best=(8,))
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "checkpoint-9"
    assert checkpoints.find("auto")[0] == tmp_path / "checkpoints" / "checkpoint-9"


def test_resume_from_another_run_or_never_sets_all_checkpoints_aside(tmp_path: Path) -> None:
    ours, other = (Checkpoints(tmp_path / name, single_world(), keep_last=2) for name in ("ours", "other"))
    save(ours, 4)
    save(other, 9)
    elsewhere = tmp_path / "other" / "checkpoints" / "checkpoint-9"
    assert ours.find(str(elsewhere))[0] == elsewhere
    ours.go_on_from(elsewhere)
    assert names(tmp_path / "ours" / "checkpoints") == []
    assert names(tmp_path / "other" / "checkpoints") == ["checkpoint-9", "latest"]
    save(ours, 2)
    assert ours.find("never") == (None, [])
    ours.go_on_from(None)
    assert names(tmp_path / "ours" / "checkpoints-2") == ["checkpoint-2", "latest"]


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, single_world(), keep_last=2)
    best = [(1,), (1,), (3, 1), (3, 1), (3, 5), (3, 5)]
    for step, of in enumerate(best, 1):
        save(checkpoints, step, best=of)
    assert names(tmp_path / "checkpoints") == ["best", "checkpoint-3", "checkpoint-5", "checkpoint-6", "latest"]
    assert (tmp_path / "checkpoints" / "best").resolve().name == "checkpoint-3"


@pytest.mark.parametrize("background", [False, True])
def test_a_best_one_that_was_not_written_pushes_nothing_out(tmp_path: Path, background: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, single_world(), keep_last=1, background=background)
    said: list[str] = []

    def full(operation: str, path: Path) -> None:
        if operation == "write":
            raise OSError(errno.ENOSPC, "No space left on device")

    run = SimpleNamespace(best=Best("accuracy", "max"), checkpoints=checkpoints, world=checkpoints.world)
    run.console = SimpleNamespace(message=said.append)
    run.world.requests = SimpleNamespace(saved=lambda seconds: None)
    run._saving = None
    run._settle, run._own_state = partial(Run._settle, run), lambda: {"best": list(run.best.top)}  # type: ignore[arg-type]

    def step(number: int, accuracy: float) -> bool:
        new = run.best.offer(number, {"accuracy": accuracy})
        Run._save(run, Mark(number), {}, {"actor": Engine()})  # type: ignore[arg-type]
        return new

    assert step(5, 0.9) and checkpoints.finish() is None
    with monkeypatch.context() as broken:
        broken.setattr(files, "before", full)
        assert step(10, 0.95)
        checkpoints.finish()
    assert not step(15, 0.3) and not step(20, 0.2)
    assert checkpoints.finish() is None and len(said) == 1 and "checkpoint-10 is not written" in said[0]
    assert names(tmp_path / "checkpoints") == ["best", "checkpoint-20", "checkpoint-5", "latest"]
    assert (tmp_path / "checkpoints" / "best").resolve().name == "checkpoint-5" and run.best.steps == [5]
    state = json.loads((tmp_path / "checkpoints" / "checkpoint-20" / "trainer_state.json").read_text())
    assert state["best"] == [[0.9, 5]]
    with monkeypatch.context() as broken:  # a better one fails, and then a save inside of the next step finds out
        broken.setattr(files, "before", full)
        assert step(22, 0.99)
        checkpoints.finish()
    Run._save(run, Mark(22, 1), {}, {"actor": Engine()})  # type: ignore[arg-type]
    checkpoints.finish()
    assert json.loads((tmp_path / "checkpoints" / "checkpoint-22+1" / "trainer_state.json").read_text())["best"] == [[0.9, 5]]
    assert step(25, 0.97) and not step(30, 0.1) and checkpoints.finish() is None
    assert names(tmp_path / "checkpoints") == ["best", "checkpoint-25", "checkpoint-30", "latest"]


def test_room_is_looked_for_with_what_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under LoRA that is nearly all of it."""
    checkpoints = Checkpoints(tmp_path, single_world(), keep_last=1)
    checkpoints.prepare({"actor": Engine()}, 14_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_000_000_000))
    begun: list[int] = []
    failure = checkpoints.save(Mark(1), {"actor": Engine()}, {}, exporter=lambda copy: begun.append(1))  # type: ignore[func-returns-value]
    assert failure is not None and "a checkpoint takes 14.00 GB and 1.00 GB are free" in failure.text and not begun
    assert checkpoints.save(Mark(2), {"actor": Engine()}, {}) is None, "a save between phases exports nothing"


def test_the_newest_of_a_good_step_is_kept_and_found(tmp_path: Path) -> None:
    checkpoints, engine = Checkpoints(tmp_path, single_world(), keep_last=1), Engine()
    checkpoints.save(Mark(1), {"actor": engine}, {"good": True})
    checkpoints.save(Mark(2), {"actor": engine}, {"good": True})
    checkpoints.save(Mark(2, 3), {"actor": engine}, {"good": True})
    checkpoints.save(Mark(3), {"actor": engine}, {"good": False})
    assert names(tmp_path / "checkpoints") == ["checkpoint-2", "checkpoint-3", "latest"]
    assert checkpoints.last_good() == tmp_path / "checkpoints" / "checkpoint-2"
    flip(tmp_path / "checkpoints" / "checkpoint-2" / "actor" / "rank-0-000.safetensors")
    assert checkpoints.last_good() is None


def test_what_optimizers_will_still_make() -> None:
    """Adam's states are made with the engine; others come with the first step, and a rollout leaves them their memory."""
    masters = [torch.zeros(6, requires_grad=True), torch.zeros(4, requires_grad=True)]
    parts = [Part("a", 0, 3, [3], masters[0], 0), Part("b", 0, 3, [3], masters[0], 3), Part("c", 0, 4, [4], masters[1], 0)]
    momentum = torch.optim.SGD(masters, lr=0.1, momentum=0.9)
    begin(parts, momentum)
    assert to_come(parts, momentum) == 4 * 10 and to_come(parts, torch.optim.SGD(masters, lr=0.1)) == 0
    adam, straight = torch.optim.AdamW(masters, lr=0.1), torch.optim.AdamW([m.clone().detach().requires_grad_() for m in masters], lr=0.1)
    assert to_come(parts, adam) == 8 * 10
    begin(parts, adam)
    assert to_come(parts, adam) == 0
    for optimizer in (adam, straight):
        for master in optimizer.param_groups[0]["params"]:
            master.grad = torch.linspace(-1, 1, len(master))
        optimizer.step()
    for mine, torchs in zip(adam.state.values(), straight.state.values(), strict=True):
        assert list(mine) == list(torchs) and all(torch.equal(mine[key], torchs[key]) for key in mine)
    engines = [SimpleNamespace(states_to_come=lambda: 5), SimpleNamespace(states_to_come=lambda: 7)]
    assert memory_to_come(engines, [SimpleNamespace(visiting=100)]) == 112  # type: ignore[list-item,arg-type]


def test_large_states_on_the_host_are_copied_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.state.FILE_BYTES", 64)
    pinned = PinnedCopies(torch.device("cpu"))
    pinned.prepare(100)
    for turn in range(2):
        live = [torch.arange(n) + turn for n in (3, 5, 0, 50, 2)]
        expected = [tensor.tolist() for tensor in live]
        pinned.begin()
        kept = [pinned(tensor) for tensor in live]
        for tensor in live:
            tensor += 10
        assert [tensor.tolist() for tensor in kept] == expected, "the writer reads it while the next step changes it"
    assert [len(arena) for arena in pinned._arenas] == [101, 400, 64], "what was prepared, and more where that is not enough; kept for the next time"


def test_background_saves_need_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.checkpoint.host_capacity", lambda ranks: 100)
    engine = Engine()
    assert Checkpoints(tmp_path, single_world(), keep_last=1).prepare({"actor": engine}, 10**9) is None
    behind = Checkpoints(tmp_path, single_world(), keep_last=1, background=True)
    assert behind.prepare({"actor": engine}, 60 - engine.state_bytes()) is None and behind.background
    remark = behind.prepare({"actor": engine}, 61 - engine.state_bytes())
    assert remark is not None and "checkpoints are written in the foreground" in remark and not behind.background
    assert save(behind, 1) is None and not behind.writing and assert_usable(tmp_path, (1,)) == 1


def test_a_failure_is_told_once_and_of_its_own_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for background in (False, True):
        checkpoints = Checkpoints(tmp_path / str(background), single_world(), keep_last=9, background=background)
        files.before = at(1, fail)
        told = [checkpoints.save(Mark(1), {"actor": Engine()}, {})]
        checkpoints.finish()
        files.before = lambda operation, path: None
        told += [checkpoints.save(Mark(step), {"actor": Engine()}, {}) for step in (2, 3)]
        assert [failure and failure.missing for failure in told] == ([None, Mark(1), None] if background else [Mark(1), None, None])
        assert checkpoints.finish() is None and names(checkpoints.folder) == ["checkpoint-2", "checkpoint-3", "latest"]
        with monkeypatch.context() as full:
            full.setattr(Checkpoints, "_no_room", lambda self, size: "no room")
            told = [checkpoints.save(Mark(4), {"actor": Engine()}, {})]
        told.append(checkpoints.save(Mark(5), {"actor": Engine()}, {}))
        assert [failure and failure.missing for failure in told] == [Mark(4), None]
        assert checkpoints.finish() is None


def broken_export(world: World, folder: Path) -> list[Any]:
    checkpoints, tensors = Checkpoints(folder, world, keep_last=2), [("a", torch.zeros(1)), ("b", torch.zeros(1))]
    seen = []

    def gathered() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            world.barrier()
            seen.append(name)
            yield name, tensor

    def copy(tensor: Tensor) -> Tensor:
        raise MemoryError("no host memory")

    def exporter(copy_: Callable[[Tensor], Tensor]) -> None:
        on_host(gathered(), world.is_main, copy)

    failure = checkpoints.save(Mark(1), {"actor": Half(world.rank)}, {}, (), exporter)
    return [seen, failure and failure.text, checkpoints.save(Mark(2), {"actor": Half(world.rank)}, {})]


def test_a_device_without_memory_is_no_failed_save(tmp_path: Path) -> None:
    """Others wait in the same gathering: this rank must not go on as if only its file were missing."""

    def exporter(copy: Callable[[Tensor], Tensor]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Checkpoints(tmp_path, single_world(), keep_last=1).save(Mark(1), {"actor": Engine()}, {}, (), exporter)


def test_an_export_that_fails_on_one_rank_ends_no_run(tmp_path: Path) -> None:
    for seen, text, later in run_ranks(broken_export, 2, tmp_path):
        assert seen == ["a", "b"] and "checkpoint-1 is not written: rank 0: MemoryError: no host memory" in text and later is None
    assert names(tmp_path / "checkpoints") == ["checkpoint-2", "latest"]


def test_inside_of_a_step_comes_after_the_step_before_and_before_its_end(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, single_world(), keep_last=10)
    for step, part in ((9, 0), (9, 2), (9, 10), (10, 0)):
        save(checkpoints, step, part=part)
        assert checkpoints.find("auto")[0] == tmp_path / "checkpoints" / Mark(step, part).folder
    assert names(tmp_path / "checkpoints" / "checkpoint-9+2" / "progress") == ["step.safetensors"]


def test_tensor_files_are_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "none": torch.zeros(0), "b": torch.arange(4).bfloat16(), "c": torch.tensor(7), "d": torch.tensor([True])}
    files.write_tensors(tmp_path / "ours", tensors, {"state": "x"})
    save_file(tensors, tmp_path / "theirs", {"state": "x"})
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() == tensors.keys()
    assert all(torch.equal(ours[name], tensors[name]) and ours[name].dtype == tensors[name].dtype for name in tensors)
    buffer = torch.arange(8.0)  # parts of one buffer, which `save_file` refuses
    files.write_tensors(tmp_path / "parts", {"x": buffer[:3], "y": buffer[4:]}, {})
    assert load_file(tmp_path / "parts")["y"].tolist() == [4, 5, 6, 7]


# --------------------------------------------------------------------------------------------------------------------------
# Disks that fail, and kills


def operations(tmp_path: Path) -> int:
    """Of a second save that replaces the first (`keep_last: 1`)."""
    count = 0

    def note(operation: str, path: Path) -> None:
        nonlocal count
        count += 1

    checkpoints = Checkpoints(tmp_path / "counted", single_world(), keep_last=1)
    save(checkpoints, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "before", note)
        save(checkpoints, 2)
    assert count > 20
    return count


def at(number: int, act: Callable[[], None]) -> Callable[[str, Path], None]:
    """`files.before` that acts at the operation of this number, and at all later ones."""
    seen = 0

    def before(operation: str, path: Path) -> None:
        nonlocal seen
        seen += 1
        if seen >= number:
            act()

    return before


def fail() -> None:
    raise OSError(errno.EIO, "the disk is broken")


def test_every_operation_failed_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = set()
    for number in range(1, operations(tmp_path) + 1):
        run_dir = tmp_path / str(number)
        checkpoints = Checkpoints(run_dir, single_world(), keep_last=1)
        save(checkpoints, 1)
        monkeypatch.setattr(files, "before", at(number, fail))
        problem = save(checkpoints, 2)
        monkeypatch.undo()
        assert problem is not None and "broken" in problem.text
        reached.add(assert_usable(run_dir, (1, 2)))
        assert save(Checkpoints(run_dir, single_world(), keep_last=1), 3) is None
        assert assert_usable(run_dir, (3,)) == 3
    assert reached == {1, 2}


def test_killed_at_every_operation_in_turn(tmp_path: Path) -> None:
    reached = set()
    for number in range(1, operations(tmp_path) + 1):
        run_dir = tmp_path / str(number)
        save(Checkpoints(run_dir, single_world(), keep_last=1), 1)
        child = os.fork()
        if child == 0:
            files.before = at(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            save(Checkpoints(run_dir, single_world(), keep_last=1), 2)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        reached.add(assert_usable(run_dir, (1, 2)))
        assert save(Checkpoints(run_dir, single_world(), keep_last=1), 3) is None
        assert assert_usable(run_dir, (3,)) == 3
    assert reached == {1, 2}


def test_a_full_disk(tmp_path: Path) -> None:
    """First there is room by the count but not for all of it, then not even by the count."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small disk takes rights that this user has not")
    try:
        checkpoints = Checkpoints(disk / "run", single_world(), keep_last=2)
        assert save(checkpoints, 1) is None
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 8192))
        failure = save(checkpoints, 2)
        assert failure is not None and "No space left on device" in failure.text
        assert assert_usable(disk / "run", (1,)) == 1
        with (disk / "filler").open("ab") as file:
            file.write(bytes(shutil.disk_usage(disk).free))
        failure = save(checkpoints, 3)
        assert failure is not None and "make room, or lower checkpoint.keep_last" in failure.text
        assert checkpoints.finish() == failure, "the end of the run must hear of it"
        (disk / "filler").unlink()
        assert save(checkpoints, 4) is None and checkpoints.finish() is None
        assert assert_usable(disk / "run", (4,)) == 4
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [truncate, flip, Path.unlink])
def test_every_file_spoilt_in_turn_is_named_and_the_one_before_used(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    pattern = tmp_path / "pattern"
    checkpoints = Checkpoints(pattern, single_world(), keep_last=2)
    save(checkpoints, 1)
    save(checkpoints, 2)
    victims = [p.relative_to(pattern) for p in (pattern / "checkpoints" / "checkpoint-2").rglob("*") if p.is_file()]
    assert len(victims) == 6
    for number, victim in enumerate(victims):
        run_dir = tmp_path / str(number)
        shutil.copytree(pattern, run_dir, symlinks=True)
        spoil(run_dir / victim)
        found, remarks = Checkpoints(run_dir, single_world(), keep_last=2).find("auto")
        assert found == run_dir / "checkpoints" / "checkpoint-1"
        # What is spoilt of the manifest may be the first letter of its entry for itself.
        named = "nifest.json" if victim.name == "manifest.json" else str(victim.relative_to("checkpoints/checkpoint-2"))
        assert named in remarks[0] and "damaged-checkpoint-2" in remarks[0]
        assert (run_dir / "checkpoints" / "damaged-checkpoint-2").is_dir(), "what is left is kept"
        assert (run_dir / "checkpoints" / "latest").resolve() == found
        assert_usable(run_dir, (1,))


def test_only_damaged_ones_are_no_fresh_start(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, single_world(), keep_last=2)
    for step in (1, 2):
        save(checkpoints, step)
        flip(tmp_path / "checkpoints" / f"checkpoint-{step}" / "actor" / "rank-0-000.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint-2: actor/rank-0-000.safetensors is damaged, and there is none before it that is whole"):
        checkpoints.find("auto")
    assert names(tmp_path / "checkpoints") == ["checkpoint-1", "checkpoint-2", "latest"], "nothing is moved"


# --------------------------------------------------------------------------------------------------------------------------
# Two ranks, and in the background


class Half(Engine):
    """A rank's own file."""

    def __init__(self, rank: int) -> None:
        super().__init__(float(rank))
        self.rank = rank

    def state_files(self, copy: Callable[[Tensor], Tensor] = copy_to_host) -> Iterator[TensorFile]:
        yield TensorFile(f"rank-{self.rank}-000.safetensors", {"value": copy(self.value)}, {"state": "{}"})


def saves_of_two(world: World, folder: Path, background: bool) -> list[Failure | None]:
    checkpoints, engine = Checkpoints(folder, world, keep_last=3, background=background), Half(world.rank)
    problems = [checkpoints.save(Mark(1), {"actor": engine}, {}, (), lambda copy: export if world.is_main else None)]
    engine.value += 10  # while the first is perhaps still written
    if not background:
        if world.rank == 1:
            files.before = at(1, fail)
        problems.append(checkpoints.save(Mark(2), {"actor": engine}, {}))
        files.before = lambda operation, path: None
        problems.append(checkpoints.save(Mark(3), {"actor": engine}, {}))
    return [*problems, checkpoints.finish()]


def test_what_fails_on_one_rank_is_known_to_all(tmp_path: Path) -> None:
    for problems in run_ranks(saves_of_two, 2, tmp_path, False):
        assert problems[0] is None and problems[2:] == [None, None]
        assert "rank 1: OSError" in problems[1].text
    assert names(tmp_path / "checkpoints") == ["checkpoint-1", "checkpoint-3", "latest"]


def test_background_writes_the_same_bytes(tmp_path: Path) -> None:
    run_ranks(saves_of_two, 2, tmp_path / "at once", False)
    for problems in run_ranks(saves_of_two, 2, tmp_path / "behind", True):
        assert problems == [None, None]
    first, second = (tmp_path / name / "checkpoints" / "checkpoint-1" for name in ("at once", "behind"))
    assert damage(first) is None and damage(second) is None
    same = [json.loads((folder / "manifest.json").read_text()) for folder in (first, second)]
    assert same[0] == same[1] and any("rank-1" in name for name in same[0])


# ---- who waits for whom while states are written


def meet(world: World, in_thread: bool) -> bool:
    """What rank 0 has told of itself while it waited for rank 1 at the store."""
    told: list[bool] = []
    if world.rank == 1:
        while not world.store.check(["seen"]):  # type: ignore[union-attr]
            time.sleep(0.01)
    else:

        def look() -> None:
            while not world.store.check(["test/1/0"]):  # type: ignore[union-attr]
                time.sleep(0.01)
            time.sleep(0.1)
            told.append(world.watchdog._place.waits)
            world.store.set("seen", "")  # type: ignore[union-attr]

        threading.Thread(target=look).start()
    if in_thread:
        meeting = threading.Thread(target=world.exchange, args=("test", ""))
        meeting.start()
        meeting.join()
    else:
        world.exchange("test", "")
    return bool(told and told[0]) or world.watchdog._place.waits


@pytest.mark.parametrize("in_thread", [False, True])
def test_who_waits_at_the_store_is_known_to_wait(in_thread: bool) -> None:
    """Else nobody can tell which rank hangs in a save, and the processor time of its looking is taken for progress: the job would stand for good."""
    assert run_ranks(meet, 2, in_thread) == [not in_thread, False]


def test_a_disk_that_hangs_makes_no_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "LOOK_SECONDS", 0.01)
    checkpoints, over = Checkpoints(tmp_path, single_world(), keep_last=2), threading.Event()
    dog = checkpoints.world.watchdog
    checkpoints._writer = threading.Thread(target=over.wait)
    checkpoints._writer.start()
    waiting = threading.Thread(target=checkpoints.finish)
    waiting.start()
    beats = []
    for _ in range(2):
        time.sleep(0.2)
        beats.append(dog.beats)
    checkpoints._written += 1
    time.sleep(0.2)
    beats.append(dog.beats)
    assert beats[0] == beats[1] and beats[2] == beats[1] + 1 and not dog._place.waits
    checkpoints._meets = True
    time.sleep(0.2)
    assert dog._place.waits and dog.beats == beats[2]
    over.set()
    waiting.join()
    assert not dog._place.waits
