"""Triton's interpreter, for kernels on a machine without a GPU; conftest sets TRITON_INTERPRET before they are defined."""

from __future__ import annotations

import pytest


def interpreted() -> None:
    """Skips where Triton is missing. Triton 3.6 makes Python numbers of one-element arrays in a way that numpy 2.4 has stopped to allow: loop bounds
    need this."""
    pytest.importorskip("triton")
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor
    if hasattr(original, "original"):
        return

    def patched(tensor: type, scope: object) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patched.original = original
    interpreter._patch_lang_tensor = patched
