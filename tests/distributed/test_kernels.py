"""All of an update with the kernels of a GPU in it, by Triton's interpreter, where Triton can be imported (`scripts/test.sh` sees to that)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.one_update import difference


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("algorithm", "dtype", "forwards", "checkpointing", "lora", "limit"),
    [
        ("ppo", "float32", "packed", "false", 0, 1e-5),
        ("ppo", "bfloat16", "packed", "mlp", 0, 0.1),
        ("dr_grpo", "bfloat16", "tokens", "false", 4, 0.1),
        ("grpo", "bfloat16", "padded", "true", 0, 0.1),
    ],
)
def test_an_update_in_kernels_is_one_without(
    models: Path, tmp_path: Path, algorithm: str, dtype: str, forwards: str, checkpointing: str, lora: int, limit: float
) -> None:  # fmt: skip
    pytest.importorskip("triton")
    found = difference(models, tmp_path, algorithm, dtype, forwards, checkpointing, lora, "interpreted")
    assert max(found.values()) < limit, found
