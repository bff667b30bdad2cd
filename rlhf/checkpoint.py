"""Checkpoints: everything that decides the next token, complete or not there at all.

    checkpoints/latest, best     links
    checkpoints/checkpoint-100/  actor/ critic/    trained weights and optimizer states (`state`)
                                 rng/              generators of every rank
                                 progress/         what step 101 has finished so far: only in checkpoint-100+1, checkpoint-100+2, ...
                                 trainer_state.json  step, sampler, KL coefficient, best metrics, ...
                                 hf/ adapter/      what other programs load
                                 manifest.json     size and SHA-256 of every file; written last

A folder is written under a temporary name and renamed when all of it, and its manifest, are on disk; only then are older ones deleted, each
under another name from the first moment. So whatever moment a kill or a failing disk hits, what is called a checkpoint is one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf import files
from rlhf.distributed import World
from rlhf.files import Written
from rlhf.memory import host_capacity, is_out_of_memory
from rlhf.requests import CONTROL
from rlhf.state import Copy, PinnedCopies, TensorFile, copy_to_host

_NAME = re.compile(r"checkpoint-(\d+)(?:\+(\d+))?")
EXPORTED = ("hf", "adapter")  # for others: nothing here reads them from a checkpoint
_HASHERS = 8  # threads
LAST_WORD_SECONDS = 60.0
LOOK_SECONDS = 5.0  # between looks at what is written in the background: each costs the main thread processor time, which counts as progress there
MANIFEST = "manifest.json"
HOST_SHARE = 0.6  # of a rank's host memory that background saves may take


class Mark(NamedTuple):
    """How far a run is: steps that are over, and parts of the next one that are."""

    step: int
    part: int = 0

    @property
    def folder(self) -> str:
        return f"checkpoint-{self.step}" + f"+{self.part}" * bool(self.part)

    @staticmethod
    def of(folder: Path) -> Mark | None:
        match = _NAME.fullmatch(folder.name)
        return Mark(int(match[1]), int(match[2] or 0)) if match else None


class Failure(NamedTuple):
    """What kept a save from being complete, or older ones from being deleted."""

    text: str
    missing: Mark | None  # the checkpoint that is not there


class Saved(Protocol):
    """An engine whose state is kept."""

    def state_bytes(self) -> int: ...
    def state_files(self, copy: Copy) -> Iterator[TensorFile]: ...
    def hold(self, until: torch.cuda.Event) -> None: ...  # the state does not change before, on the device
    def load(self, folder: Path) -> None: ...  # (collective)


Export = Callable[[Path], Mapping[Path, Written]]  # writes into a folder what other programs load; the files that are known already
Exporter = Callable[[Copy], Export | None]  # (collective) takes what that is, on rank 0


class Checkpoints:
    """The checkpoints of one run folder. Methods marked (collective) are called by all ranks together.

    background: states are copied to the host, by a GPU while it goes on until its next optimizer step, and written while training goes on; the
    same bytes."""

    def __init__(self, run_dir: Path, world: World, keep_last: int, background: bool = False) -> None:
        self.folder, self.world, self.keep_last, self.background = run_dir / "checkpoints", world, keep_last, background
        self.pinned = PinnedCopies(world.device) if background and world.device.type == "cuda" else None
        files.beat = world.beat
        self._writer: threading.Thread | None = None
        self._exported = 0.0  # bytes
        self._failure: Failure | None = None  # of the last save; known to all ranks once it is over
        self._told: Failure | None = None  # what `save` has returned before
        self._written = 0  # files, of the writer's
        self._meets = False  # the writer, which has written all its files, the others'

    def prepare(self, engines: Mapping[str, Saved], exported: int) -> str | None:
        """Lock the host memory that background saves will copy to, while other things happen; where a rank has too little, saves are not in the
        background, and what is to be said of that is returned. exported: bytes of what rank 0 exports. (collective)"""
        self._exported = float(exported)
        if not self.background:
            return None
        size, room = sum(engine.state_bytes() for engine in engines.values()) + exported * self.world.is_main, host_capacity(self.world.local_size)
        short = [(size, room)] if room is not None and size > HOST_SHARE * room else []
        if found := [entry for theirs in self.world.gather_objects(short) for entry in theirs]:  # (collective)
            self.background, self.pinned = False, None
            wanted, there = (value / 1e9 for value in found[0])
            return (
                f"checkpoint.background=true would copy {wanted:.1f} GB of a rank to host memory, of which {there:.1f} GB are its share: "
                "checkpoints are written in the foreground"
            )
        if self.pinned is not None:
            self.pinned.prepare(size)
        return None

    def save(
        self,
        mark: Mark,
        engines: Mapping[str, Saved],
        state: dict[str, Any],
        best: Sequence[int] = (),
        exporter: Exporter | None = None,
        progress: TensorFile | None = None,
    ) -> Failure | None:
        """Write a checkpoint and delete what is neither among the last `keep_last` nor, by its step, in `best`, the best first. (collective)

        progress: of rank 0. What keeps this save from being complete is returned, once, the same on every rank, and all earlier checkpoints are
        there; in the background, what kept the last one."""
        self.finish()  # (collective)
        own = float(sum(engine.state_bytes() for engine in engines.values())) + (progress.nbytes if progress else 0)
        size = self.world.global_sum({"bytes": own})["bytes"] + self._exported * (exporter is not None)  # (collective)
        if problem := self.world.broadcast_object(self._no_room(size) if self.world.is_main else None):  # (collective)
            self._failure = Failure(problem, mark)
            return self._untold()
        if self.pinned is not None:
            self.pinned.begin()
        export = problem = ready = None
        try:
            export = exporter(self.pinned.now if self.pinned else copy_to_host) if exporter else None  # (collective)
        except Exception as error:  # no host memory, say: the others hear of it from the writer
            if is_out_of_memory(error):  # of the device, while others wait in the same gathering: the job ends, and is started again
                raise
            problem = f"{type(error).__name__}: {error}"
        contents = self._contents(engines, progress, self.pinned or copy_to_host)
        facts = {"step": mark.step, "part": mark.part, "world_size": self.world.size, **state}
        if self.background:
            earlier = self._untold()
            try:
                contents = list(contents)
                if self.pinned is not None and (ready := self.pinned.ready()):
                    for engine in engines.values():
                        engine.hold(ready)
            except Exception as error:
                contents, problem = [], f"{type(error).__name__}: {error}"
            task = (mark, contents, facts, best, export, problem, ready)
            self._writer = threading.Thread(target=self._write, args=task, name="checkpoint-writer", daemon=True)
            self._writer.start()
            return earlier
        self._write(mark, contents, facts, best, export, problem)
        self.finish()  # (collective)
        return self._untold()

    def _untold(self) -> Failure | None:
        told, self._told = self._told, self._failure
        return None if self._failure == told else self._failure

    def abandon(self) -> None:
        """Before this process ends without the others: what is being written may still become whole."""
        if self._writer is not None:
            self._writer.join(LAST_WORD_SECONDS)

    @property
    def writing(self) -> bool:
        """In the background, on this rank."""
        return self._writer is not None and self._writer.is_alive()

    def finish(self) -> Failure | None:
        """Wait for what is written in the background; what kept the last save from being complete. (collective)"""
        with contextlib.ExitStack() as stack:
            seen, waits = self._written, False
            while self.writing:
                assert self._writer is not None
                self._writer.join(LOOK_SECONDS)
                if self._written != seen:  # a disk that hangs makes no progress
                    seen = self._written
                    self.world.beat()
                if self._meets and not waits:  # for a rank that still writes
                    stack.enter_context(self.world.watchdog.waiting())
                    waits = True
        self._writer = None
        self._failure = self.world.broadcast_object(self._failure)  # (collective)
        return self._failure

    def _no_room(self, size: float) -> str | None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            return str(error)
        if free < size:
            return f"{self.folder}: a checkpoint takes {size / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: make room, or lower checkpoint.keep_last"
        return None

    def _contents(self, engines: Mapping[str, Saved], progress: TensorFile | None, copy: Copy) -> Iterable[tuple[str, TensorFile]]:
        for name, engine in engines.items():
            for file in engine.state_files(copy):
                yield name, file
        yield "rng", TensorFile(f"rank-{self.world.rank}.safetensors", _rng_state(), {})
        if progress is not None:
            yield "progress", progress

    def _write(
        self,
        mark: Mark,
        contents: Iterable[tuple[str, TensorFile]],
        facts: dict[str, Any],
        best: Sequence[int],
        export: Export | None,
        problem: str | None = None,
        ready: torch.cuda.Event | None = None,
    ) -> None:
        """Without a collective: ranks meet at the store, from threads of their own if need be. problem: that there is already, on this rank; ready:
        after which the contents are there."""
        final, temporary = self.folder / mark.folder, self.folder / f".writing-{mark.folder}"
        written: dict[str, dict[str, Any]] = {}
        try:
            if self.world.is_main and temporary.exists():
                files.remove(temporary)
        except OSError as error:
            problem = str(error)
        self.world.exchange("checkpoint", "")
        try:
            if ready is not None:
                with torch.cuda.device(self.world.device):  # a new thread's is the first one
                    ready.synchronize()
            for folder, file in contents:
                if problem is None:  # what is left is still taken, as other ranks may wait for this one there
                    files.make_folder(temporary / folder)
                    written[f"{folder}/{file.name}"] = asdict(files.write_tensors(temporary / folder / file.name, file.tensors, file.metadata))
                    self._written += 1
            if export is not None and problem is None:
                files.before("export", temporary)
                written |= {str(path.relative_to(temporary)): asdict(entry) for path, entry in export(temporary).items()}
        except Exception as error:  # whatever a disk and a library may raise: the run does not end with it
            problem = f"{type(error).__name__}: {error}"
        self._meets = True
        found = [json.loads(text) for text in self.world.exchange("checkpoint", json.dumps([written, problem]))]
        self._meets = False
        if not self.world.is_main:
            return
        problem = next((f"rank {rank}: {theirs}" for rank, (_, theirs) in enumerate(found) if theirs), None)
        if problem is None:
            try:
                self._commit(temporary, final, {name: entry for theirs, _ in found for name, entry in theirs.items()}, facts)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
        if problem is not None:
            self._failure = Failure(f"{final.name} is not written: {problem}", mark)
            shutil.rmtree(temporary, ignore_errors=True)
            return
        self._failure = None
        try:
            self._tidy(mark, best)
        except OSError as error:
            self._failure = Failure(f"{final.name} is written, but older ones are not deleted: {error}", None)

    def _commit(self, temporary: Path, final: Path, manifest: dict[str, dict[str, Any]], facts: dict[str, Any]) -> None:
        manifest["trainer_state.json"] = asdict(files.write_text(temporary / "trainer_state.json", json.dumps(facts, indent=1) + "\n"))
        found = {str(p.relative_to(temporary)): p for p in temporary.rglob("*") if p.is_file()}
        for name in found.keys() - manifest.keys():  # exported
            manifest[name] = asdict(files.adopt(found[name]))
        files.write_text(temporary / MANIFEST, _manifest(manifest))
        for folder in [p for p in temporary.rglob("*") if p.is_dir()]:
            files.sync_folder(folder)
        files.sync_folder(temporary)
        if missing := [name for name, entry in manifest.items() if (temporary / name).stat().st_size != entry["size"]]:
            raise OSError(f"{missing[0]} has changed while it was written")
        if final.exists():  # of another history: the run goes on from an older one
            files.remove(final)
        files.rename(temporary, final)
        files.sync_folder(self.folder)

    def _tidy(self, mark: Mark, best: Sequence[int]) -> None:
        files.link(self.folder / "latest", mark.folder)
        if control := os.environ.get(CONTROL):
            Path(control, "saved").touch()
        if best and mark == Mark(best[0]):
            files.link(self.folder / "best", mark.folder)
        files.sync_folder(self.folder)
        marks = self._marks()
        keep = {*marks[-self.keep_last :], *(Mark(step) for step in best), mark, next((m for m in reversed(marks) if self._is_good(m)), mark)}
        for old in marks:
            if old not in keep:
                files.remove(self.folder / old.folder)

    def find(self, resume: str) -> tuple[Path | None, list[str]]:
        """(the folder that `--resume auto|never|PATH` means, checked against its manifest; what there is to say about it). None = start afresh.
        (collective)

        `auto` passes over damaged ones, which are renamed, to the newest that is whole. Raises ValueError where the one that is named is damaged or
        none, and where there are only damaged ones."""
        found: Path | None = None
        problem: str | None = None
        remarks: list[str] = []
        if self.world.is_main:
            for unfinished in list(self.folder.glob(".*")):
                if unfinished.is_symlink():
                    unfinished.unlink()
                elif unfinished.is_dir():
                    shutil.rmtree(unfinished)
            marks = self._marks()
            if resume == "auto":
                found, problem, remarks = self._newest_whole(marks)
            elif resume != "never":
                found = Path(resume).resolve()  # `latest` is a link that will move
                problem = damage(found)
        found, problem, remarks = self.world.broadcast_object((found, problem, remarks))
        if problem:
            raise ValueError(f"--resume {resume}: {found}: {problem}; name another checkpoint, or --resume never to start afresh")
        return found, remarks

    def go_on_from(self, found: Path | None) -> list[str]:
        """The history that begins now is that of `found`, or a new one. What another has written is moved to `checkpoints-N`, and never mixed with
        this one's: among the last ones it would push out the new ones. What there is to say of it. (rank 0)"""
        own = Mark.of(found) if found is not None and found.parent == self.folder.resolve() else None
        others = [mark for mark in self._marks() if not (own and mark <= own)]
        aside = self._set_aside(others)
        return [f"{len(others)} checkpoints of an earlier run are kept in {aside}"] if aside else []

    def _newest_whole(self, marks: Sequence[Mark]) -> tuple[Path | None, str | None, list[str]]:
        problems: dict[Path, str] = {}
        for mark in reversed(marks):
            folder = self.folder / mark.folder
            if problem := damage(folder):
                problems[folder] = problem
                continue
            remarks = []
            for other, problem in problems.items():  # no longer called a checkpoint: among the last ones it would push out those that are
                aside, number = self.folder / f"damaged-{other.name}", 1
                while aside.exists():
                    aside, number = self.folder / f"damaged-{other.name}-{number + 1}", number + 1
                files.rename(other, aside)
                remarks.append(f"{other}: {problem}; it is now {aside.name}, and {folder.name} is used")
            for name in ("latest", "best"):
                if (self.folder / name).is_symlink() and not (self.folder / name).exists():
                    files.link(self.folder / name, folder.name)
            return folder, None, remarks
        if not problems:
            return None, None, []
        newest, problem = next(iter(problems.items()))
        return newest, f"{problem}, and there is none before it that is whole", []

    def last_good(self) -> Path | None:
        """The newest whole checkpoint of the end of a step that was good (`state["good"]`). (collective)"""
        found = None
        if self.world.is_main:
            folders = (self.folder / mark.folder for mark in reversed(self._marks()) if self._is_good(mark))
            found = next((folder for folder in folders if damage(folder) is None), None)
        return self.world.broadcast_object(found)

    def _is_good(self, mark: Mark) -> bool:
        if mark.part:
            return False
        try:
            return bool(json.loads((self.folder / mark.folder / "trainer_state.json").read_text()).get("good", True))
        except (OSError, ValueError):
            return False

    def _set_aside(self, marks: list[Mark]) -> Path | None:
        if not marks:
            return None
        number = 1
        while (aside := self.folder.with_name(f"checkpoints-{number}")).exists():
            number += 1
        aside.mkdir()
        for mark in marks:
            files.rename(self.folder / mark.folder, aside / mark.folder)
        for name in ("latest", "best"):
            link = self.folder / name
            if link.is_symlink() and not link.exists():
                files.rename(link, aside / name)
        return aside

    def load(self, folder: Path, engines: Mapping[str, Saved]) -> dict[str, Any]:
        """Restore engines and generators, give back the trainer's state. (collective)"""
        state: dict[str, Any] = files.read_object(folder / "trainer_state.json")
        for name, engine in engines.items():
            engine.load(folder / name)
        if state["world_size"] != self.world.size:  # the generators of other ranks: dropout goes on with those that this start has seeded
            return state
        rng = files.read_tensors(folder / "rng" / f"rank-{self.world.rank}.safetensors")
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and torch.cuda.is_available():
            torch.cuda.set_rng_state(rng["cuda"])
        return state

    def _marks(self) -> list[Mark]:
        return sorted(mark for p in (self.folder.iterdir() if self.folder.is_dir() else []) if (mark := Mark.of(p)))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file of its manifest must have its size and SHA-256, and nothing else in it is read."""
    try:
        text = (folder / "manifest.json").read_text()
        entries = json.loads(text)
        own = entries.pop(MANIFEST, None)
        manifest = {name: Written(**entry) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        return f"no readable manifest.json, so it is not a complete checkpoint ({type(error).__name__})"
    if text != (_manifest(entries) if own else _text(entries)) or "trainer_state.json" not in manifest:  # those of before 2026-11-29 have no entry
        return "manifest.json is damaged"
    if outside := next((name for name in manifest if Path(name).is_absolute() or ".." in Path(name).parts), None):
        return f"manifest.json names {outside!r}, which is not in the folder"
    read = {str(p.relative_to(folder)) for p in folder.glob("*/*.safetensors") if p.parent.name not in EXPORTED}
    if strange := sorted(read - manifest.keys()):
        return f"{strange[0]} is not in its manifest"

    def wrong(name: str) -> str | None:
        file, entry = folder / name, manifest[name]
        try:
            if not file.is_file():
                return f"{name} is missing"
            whole = file.stat().st_size == entry.size and files.digest_of(file) == entry.sha256
        except OSError as error:
            return f"{name}: {error.strerror}"
        return None if whole else f"{name} is damaged"

    with ThreadPoolExecutor(_HASHERS) as pool:
        return next((problem for problem in pool.map(wrong, manifest) if problem), None)


def _manifest(entries: Mapping[str, Any]) -> str:
    """Its text, with an entry for itself: of the other entries, so that what is damaged in them is not taken for a damaged file."""
    others = _text(entries).encode()
    return _text({**entries, MANIFEST: asdict(Written(len(others), hashlib.sha256(others).hexdigest()))})


def _text(entries: Mapping[str, Any]) -> str:
    return json.dumps(dict(sorted(entries.items())), indent=1) + "\n"


def _rng_state() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
