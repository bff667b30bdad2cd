"""Set-up of all tests: one thread, no network, shapes of rlhf.ops checked, and tiny random models saved once per session."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="offline")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # where Triton is installed; read when kernels are defined
torch.set_num_threads(1)  # forked ranks inherit a process without worker threads
with contextlib.suppress(ImportError):  # a GPU machine may lack what only CPU tests need
    import beartype  # noqa: F401
    import jaxtyping
    from hypothesis import settings

    # The annotations of the pure layer (Float[Tensor, "b r"]) are checked in tests only; modules with Triton kernels are compiled from their source.
    pure = [f"rlhf.ops.{name}" for name in ("advantages", "kl", "logprobs", "losses", "masking")]
    jaxtyping.install_import_hook(pure, "beartype.beartype")
    settings.register_profile("rlhf", deadline=None, derandomize=True, max_examples=60)
    settings.load_profile("rlhf")


def pytest_collection_finish(session: pytest.Session) -> None:
    """DeepSpeed compiles its CPU collectives at its first start (25-70 s): here, where no test's time runs."""
    if not any({"distributed", "e2e", "chaos"} & set(item.path.parts) for item in session.items) or session.config.option.collectonly:
        return
    program = (
        "from rlhf.distributed import init_world; from rlhf.engine import loading_context;"
        "loading_context({'zero_optimization': {'stage': 0}}, init_world(1))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent, check=True, capture_output=True, timeout=600)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny random model folders, made on first use: see `tests.helpers.build_models`."""
    from tests.helpers import build_models

    folder = tmp_path_factory.mktemp("models")
    build_models(folder)
    return folder
