"""Device memory that can be given back and taken again at the same address, so that captured graphs stay valid.

The driver's virtual memory management (CUDA Driver API, section "Virtual Memory Management"), called through ctypes: no compiler is needed.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _AllocationProp(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class _AccessDesc(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


_PINNED, _DEVICE, _READ_WRITE, _RECOMMENDED, _OUT_OF_MEMORY = 1, 1, 3, 1, 2


class _Mapping:
    """A reserved address range and the memory behind it. It knows no tensor: the tensor made of it holds it, so that both go together."""

    def __init__(self, size: int, device: torch.device):
        torch.cuda.current_stream(device)  # the context exists
        self.driver: Any = ctypes.CDLL("libcuda.so.1")
        self.device, self.mapped = device, False
        location = _Location(_DEVICE, device.index if device.index is not None else torch.cuda.current_device())
        self._prop = _AllocationProp(type=_PINNED, location=location)
        self._access = _AccessDesc(location, _READ_WRITE)
        grain = ctypes.c_size_t()
        self._call("cuMemGetAllocationGranularity", ctypes.byref(grain), ctypes.byref(self._prop), _RECOMMENDED)
        self.size = ctypes.c_size_t(-(-size // grain.value) * grain.value)
        self.address, self._handle = ctypes.c_ulonglong(), ctypes.c_ulonglong()
        self._call("cuMemAddressReserve", ctypes.byref(self.address), self.size, ctypes.c_size_t(0), ctypes.c_ulonglong(0), ctypes.c_ulonglong(0))
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (self.address.value, False), "version": 2}

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.driver, name)(*arguments)
        if code == _OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"{self.size.value / 2**30:.1f} GiB for the rollout are not free")
        if code:
            raise RuntimeError(f"{name} failed with driver error {code}")

    def map(self) -> None:
        zero = ctypes.c_ulonglong(0)
        try:
            self._call("cuMemCreate", ctypes.byref(self._handle), self.size, ctypes.byref(self._prop), zero)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()  # what torch keeps for itself may be enough
            self._call("cuMemCreate", ctypes.byref(self._handle), self.size, ctypes.byref(self._prop), zero)
        try:
            self._call("cuMemMap", self.address, self.size, ctypes.c_size_t(0), self._handle, zero)
            self._call("cuMemSetAccess", self.address, self.size, ctypes.byref(self._access), ctypes.c_size_t(1))
        except RuntimeError:
            self._call("cuMemRelease", self._handle)
            raise
        self.mapped = True

    def unmap(self) -> None:
        torch.cuda.synchronize(self.device)
        self._call("cuMemUnmap", self.address, self.size)
        self._call("cuMemRelease", self._handle)
        self.mapped = False

    def __del__(self) -> None:
        try:
            if self.mapped:
                self.unmap()
            self.driver.cuMemAddressFree(self.address, self.size)
        except Exception:  # never came to be, or the interpreter is shutting down
            return


class DeviceBuffer:
    """Memory on `device`; `tensor` is a uint8 view of it. On CPU a plain tensor: releasing it does nothing."""

    def __init__(self, size: int, device: torch.device):
        self._mapping: _Mapping | None = None
        if device.type != "cuda":
            self.tensor = torch.zeros(size, dtype=torch.uint8, device=device)  # pages of it cost memory once they are written to
            return
        self._mapping = _Mapping(size, device)
        self._mapping.map()
        self.tensor = torch.as_tensor(self._mapping, device=device)

    @property
    def mapped(self) -> bool:
        return self._mapping is None or self._mapping.mapped

    def release(self) -> None:
        """The memory goes back to the device, its contents are lost. Nothing may use it until `restore`. (waits for the device)"""
        if self._mapping is not None and self._mapping.mapped:
            self._mapping.unmap()

    def restore(self) -> None:
        """Memory at the same address again, contents undefined. torch.OutOfMemoryError if the device has not enough."""
        if self._mapping is not None and not self._mapping.mapped:
            self._mapping.map()
