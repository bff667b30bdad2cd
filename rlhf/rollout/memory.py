"""Device memory that can be given back and taken again at the same address, so that captured graphs stay valid.

The driver's virtual memory management (CUDA Driver API, section "Virtual Memory Management"), called through ctypes: no compiler is needed.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor


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


class DeviceBuffer:
    """`bytes` of memory on `device`; `tensor` is a uint8 view of it. On CPU a plain tensor: releasing it does nothing."""

    def __init__(self, size: int, device: torch.device):
        self.device, self.mapped = device, True
        self._driver: Any = None
        if device.type != "cuda":
            self.tensor = torch.empty(size, dtype=torch.uint8, device=device)
            return
        torch.cuda.current_stream(device)  # the context exists
        self._driver = ctypes.CDLL("libcuda.so.1")
        location = _Location(_DEVICE, device.index if device.index is not None else torch.cuda.current_device())
        self._prop = _AllocationProp(type=_PINNED, location=location)
        self._access = _AccessDesc(location, _READ_WRITE)
        grain = ctypes.c_size_t()
        self._call("cuMemGetAllocationGranularity", ctypes.byref(grain), ctypes.byref(self._prop), _RECOMMENDED)
        self._size = ctypes.c_size_t(-(-size // grain.value) * grain.value)
        self._address, self._handle = ctypes.c_ulonglong(), ctypes.c_ulonglong()
        self._call("cuMemAddressReserve", ctypes.byref(self._address), self._size, ctypes.c_size_t(0), ctypes.c_ulonglong(0), ctypes.c_ulonglong(0))
        self.mapped = False
        self.restore()
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (self._address.value, False), "version": 2}
        self.tensor: Tensor = torch.as_tensor(self, device=device)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code == _OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"{self._size.value / 2**30:.1f} GiB for the rollout are not free")
        if code:
            raise RuntimeError(f"{name} failed with driver error {code}")

    def release(self) -> None:
        """The memory goes back to the device, its contents are lost. Nothing may use it until `restore`. (waits for the device)"""
        if self._driver is None or not self.mapped:
            return
        torch.cuda.synchronize(self.device)
        self._call("cuMemUnmap", self._address, self._size)
        self._call("cuMemRelease", self._handle)
        self.mapped = False

    def restore(self) -> None:
        """Memory at the same address again, contents undefined. torch.OutOfMemoryError if the device has not enough."""
        if self.mapped:
            return
        zero = ctypes.c_ulonglong(0)
        try:
            self._call("cuMemCreate", ctypes.byref(self._handle), self._size, ctypes.byref(self._prop), zero)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()  # what torch keeps for itself may be enough
            self._call("cuMemCreate", ctypes.byref(self._handle), self._size, ctypes.byref(self._prop), zero)
        self._call("cuMemMap", self._address, self._size, ctypes.c_size_t(0), self._handle, zero)
        self._call("cuMemSetAccess", self._address, self._size, ctypes.byref(self._access), ctypes.c_size_t(1))
        self.mapped = True

    def __del__(self) -> None:
        if self._driver is not None and getattr(self, "_address", None):
            try:
                self.release()
                self._driver.cuMemAddressFree(self._address, self._size)
            except Exception:  # the interpreter or the driver is shutting down
                return
