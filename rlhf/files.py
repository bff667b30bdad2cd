"""The operations on files that a checkpoint is made of, and readers of files that somebody else may have made.

Each passes through `before` first, where a test can fail it or kill the process; writing passes once for every CHUNK bytes, so that files can be
cut short too. What has returned is on disk, but for names: those are once `sync_folder` of their folder has returned.

Readers take safetensors and JSON, in which nothing can be run, and say by a ValueError which file is neither.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CHUNK = 64 << 20  # bytes

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_libc = ctypes.CDLL(None)
_BEGIN = 2  # SYNC_FILE_RANGE_WRITE: what is not on its way to the disk sets out; a hint, of which no error matters

before: Callable[[str, Path], None] = lambda operation, path: None  # noqa: E731
beat: Callable[[], None] = lambda: None  # noqa: E731  # called for every CHUNK that is written or read: a slow disk is no stall


@dataclass(frozen=True)
class Written:
    """What a manifest keeps of a file."""

    size: int  # bytes
    sha256: str


def write(path: Path, parts: Iterator[memoryview | bytes]) -> Written:
    """A new file from these bytes. Hashing, copying to the system and its writing to the disk run at the same time."""
    digest, size = hashlib.sha256(), 0
    before("open", path)
    with path.open("wb") as file, ThreadPoolExecutor(1) as hasher:
        for part in parts:
            view = memoryview(part).cast("B")
            for begin in range(0, len(view), CHUNK):
                chunk = view[begin : begin + CHUNK]
                before("write", path)
                hashed = hasher.submit(digest.update, chunk)
                file.write(chunk)
                _libc.sync_file_range(file.fileno(), ctypes.c_int64(0), ctypes.c_int64(0), _BEGIN)
                _beat()
                hashed.result()
                size += len(chunk)
        file.flush()
        before("sync", path)
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def write_text(path: Path, text: str) -> Written:
    return write(path, iter([text.encode()]))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Written:
    """A safetensors file of tensors on the host. The library's own `save_file` refuses those that lie in one buffer, as pinned copies do, and would
    have them read again for the digest."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[memoryview | bytes]:
        yield len(text).to_bytes(8, "little") + text
        for tensor in tensors.values():
            if tensor.numel():
                yield memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())

    return write(path, parts())


def adopt(path: Path) -> Written:
    """Put on disk what a library has written."""
    before("sync", path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return Written(path.stat().st_size, digest_of(path))


def open_tensors(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not readable as safetensors: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(read, dict):
        raise ValueError(f"{path}: holds {type(read).__name__} instead of a JSON object")
    return read


def digest_of(path: Path) -> str:
    digest, chunk = hashlib.sha256(), memoryview(bytearray(min(CHUNK, 1 + path.stat().st_size)))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(chunk):
            digest.update(chunk[:n])
            beat()
    return digest.hexdigest()


def _beat() -> None:
    if threading.current_thread() is threading.main_thread():  # in the background nothing says that the main thread goes on
        beat()


def make_folder(path: Path) -> None:
    before("make", path)
    path.mkdir(parents=True, exist_ok=True)


def sync_folder(path: Path) -> None:
    before("sync", path)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(path: Path, to: Path) -> None:
    before("rename", path)
    os.replace(path, to)


def remove(folder: Path) -> None:
    """A folder with all that is in it, which has another name from the first moment: half of it must not be taken for the whole."""
    aside = folder if folder.name.startswith(".") else folder.with_name(f".deleting-{folder.name}")
    if aside != folder:
        if aside.exists():
            shutil.rmtree(aside)
        rename(folder, aside)
    before("remove", aside)
    shutil.rmtree(aside)


def link(path: Path, target: str) -> None:
    """A relative symbolic link, replaced in one step."""
    temporary = path.with_name(f".{path.name}")
    before("link", path)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    rename(temporary, path)
