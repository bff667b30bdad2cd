"""Checkpoints: everything that decides the next token, complete or not there at all.

    checkpoints/latest, best     links
    checkpoints/checkpoint-100/  actor/ critic/    trained weights and optimizer states (`state`)
                                 rng/              generators of every rank
                                 trainer_state.json  step, sampler, KL coefficient, best metric, ...
                                 hf/ adapter/      what other programs load
                                 manifest.json     size and SHA-256 of every file; written last

A folder is written under a temporary name and renamed when its manifest is on disk; only then are older ones deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from rlhf.distributed import World

_NAME = re.compile(r"checkpoint-(\d+)")


class Saved(Protocol):
    """An engine whose state is kept; both calls are collective."""

    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...


class Checkpoints:
    """The checkpoints of one run folder. Methods marked (collective) are called by all ranks together."""

    def __init__(self, run_dir: Path, world: World, keep_last: int) -> None:
        self.folder, self.world, self.keep_last = run_dir / "checkpoints", world, keep_last

    def save(
        self, step: int, engines: Mapping[str, Saved], state: dict[str, Any], best_step: int | None, export: Callable[[Path], None] | None = None
    ) -> Path:
        """Write checkpoint `step` and delete what is neither among the last `keep_last` nor the best. (collective)"""
        final, temporary = self.folder / f"checkpoint-{step}", self.folder / f".writing-{step}"
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "rng").mkdir(parents=True)
        self.world.barrier()
        for name, engine in engines.items():
            engine.save(temporary / name)
        save_file(_rng_state(), temporary / "rng" / f"rank-{self.world.rank}.safetensors")
        if export is not None:
            export(temporary)
        self.world.barrier()
        if self.world.is_main:
            facts = {"step": step, "world_size": self.world.size, **state}
            _write_synced(temporary / "trainer_state.json", json.dumps(facts, indent=1))
            _write_synced(temporary / "manifest.json", json.dumps(_manifest(temporary), indent=1))
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
            _point(self.folder / "latest", final.name)
            if best_step == step:
                _point(self.folder / "best", final.name)
            _sync_folder(self.folder)
            keep = {*self._steps()[-self.keep_last :], best_step}
            for old in self._steps():
                if old not in keep:
                    shutil.rmtree(self.folder / f"checkpoint-{old}")
        self.world.barrier()
        return final

    def find(self, resume: str) -> Path | None:
        """The folder that `--resume auto|never|PATH` means, checked against its manifest; None = start afresh. (collective)

        Under `never`, and under PATH for what is not before it, the run folder's checkpoints are moved to `checkpoints-N`.
        Raises ValueError for a folder that is damaged or none.
        """
        found: Path | None = None
        problem: str | None = None
        if self.world.is_main:
            for unfinished in self.folder.glob(".writing-*"):
                shutil.rmtree(unfinished)
            steps = self._steps()
            if resume == "auto":
                found = self.folder / f"checkpoint-{steps[-1]}" if steps else None
            elif resume != "never":
                found = Path(resume).resolve()  # `latest` is a link that will move
            problem = damage(found) if found else None
            if resume != "auto" and not problem:
                # What another history wrote is kept, but never mixed with this one's: among the last ones it would push out the new ones.
                ours = found is not None and found.parent == self.folder.resolve()
                self._set_aside([s for s in steps if not (ours and found and s <= _step_of(found))])
        found, problem = self.world.broadcast_object((found, problem))
        if problem:
            raise ValueError(f"--resume {resume}: {found}: {problem}; name another checkpoint, or --resume never to start afresh")
        return found

    def _set_aside(self, steps: list[int]) -> None:
        """Move checkpoints to `checkpoints-N`."""
        if not steps:
            return
        number = 1
        while (aside := self.folder.with_name(f"checkpoints-{number}")).exists():
            number += 1
        aside.mkdir()
        for step in steps:
            os.replace(self.folder / f"checkpoint-{step}", aside / f"checkpoint-{step}")
        for name in ("latest", "best"):
            link = self.folder / name
            if link.is_symlink() and not link.exists():
                os.replace(link, aside / name)

    def load(self, folder: Path, engines: Mapping[str, Saved]) -> dict[str, Any]:
        """Restore engines and generators, give back the trainer's state. (collective)"""
        state: dict[str, Any] = json.loads((folder / "trainer_state.json").read_text())
        for name, engine in engines.items():
            engine.load(folder / name)
        if state["world_size"] != self.world.size:  # the generators of other ranks: dropout goes on with those that this start has seeded
            return state
        rng = load_file(folder / "rng" / f"rank-{self.world.rank}.safetensors")
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and torch.cuda.is_available():
            torch.cuda.set_rng_state(rng["cuda"])
        return state

    def _steps(self) -> list[int]:
        names = [_NAME.fullmatch(p.name) for p in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(m[1]) for m in names if m)


def _step_of(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file of its manifest must have its size and SHA-256."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        return f"no readable manifest.json, so it is not a complete checkpoint ({type(error).__name__})"
    for name, entry in manifest.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["size"] or _sha256(file) != entry["sha256"]:
            return f"{name} is damaged"
    return None


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    return {str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": _sha256(p)} for p in files}


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write_synced(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as handle:
        handle.write(text + "\n")
        handle.flush()
        os.fsync(handle.fileno())


def _point(link: Path, target: str) -> None:
    """A relative symbolic link, replaced in one step."""
    temporary = link.with_name(f".{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rng_state() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
