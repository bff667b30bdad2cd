"""All of an update with the kernels of a GPU in it, by Triton's interpreter, where Triton can be imported (`scripts/test.sh` sees to that)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.one_update import UPDATES, differences


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", UPDATES)
def test_an_update_in_kernels_is_one_without(models: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("triton")
    wanted, limit = UPDATES[name]
    found, _ = differences(models, tmp_path, replace(wanted, interpreted=True))
    assert max(found.values()) < limit, sorted(found.items(), key=lambda item: -item[1])[:5]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", UPDATES)
def test_one_step_in_kernels_is_one_without(models: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("triton")
    wanted, _ = UPDATES[name]
    _, together = differences(models, tmp_path, replace(wanted, interpreted=True, minibatches=1))
    assert max(together.values()) < (1e-5 if wanted.dtype == "float32" else 0.1), together
