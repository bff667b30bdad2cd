"""Imports only go down, and the light modules stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The table of docs/architecture.md; the longest matching name counts.
LAYERS = {
    "rlhf.config": 0,
    "rlhf.secrets": 0,
    "rlhf.types": 1,
    "rlhf.ops": 1,
    "rlhf.batching": 1,
    "rlhf.watchdog": 2,
    "rlhf.distributed": 2,
    "rlhf.data": 2,
    "rlhf.models": 2,
    "rlhf.offload": 2,
    "rlhf.files": 1,
    "rlhf.requests": 2,
    "rlhf.state": 2,
    "rlhf.progress": 3,
    "rlhf.guards": 4,
    "rlhf.engine": 3,
    "rlhf.rollout": 3,
    "rlhf.rewards": 3,
    "rlhf.experience": 4,
    "rlhf.checkpoint": 4,
    "rlhf.ranks": 4,
    "rlhf.memory": 4,
    "rlhf.budget": 4,
    "rlhf.metrics": 4,
    "rlhf.preflight": 4,
    "rlhf.trainers": 5,
    "train_rlhf": 6,
}


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = [file for file in (*sorted((ROOT / "rlhf").rglob("*.py")), ROOT / "train_rlhf.py") if module_name(file) != "rlhf"]


def part_of(module: str) -> str | None:
    return next((name for name in sorted(LAYERS, key=len, reverse=True) if module == name or module.startswith(f"{name}.")), None)


def imports(file: Path) -> set[str]:
    """Every module that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "rlhf")
    return found


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_go_down(file: Path) -> None:
    here = part_of(module_name(file))
    assert here is not None, f"{file}: no layer; add it to the table"
    for module in imports(file):
        there = part_of(module)
        if there is not None and there != here:
            # Modules of one layer may use each other (models uses distributed, rollout uses engine); a test below forbids circles.
            assert LAYERS[there] <= LAYERS[here], f"{module_name(file)} (layer {LAYERS[here]}) imports {module} (layer {LAYERS[there]})"


def test_no_circles() -> None:
    graph = {part: {p for f in FILES if part_of(module_name(f)) == part for m in imports(f) if (p := part_of(m)) and p != part} for part in LAYERS}
    while free := [part for part, needs in graph.items() if not needs]:
        graph = {part: needs - set(free) for part, needs in graph.items() if part not in free}
    assert not graph, f"circular imports among {sorted(graph)}"


def test_every_layer_exists() -> None:
    assert {part_of(module_name(file)) for file in FILES} == set(LAYERS)


def who_imports(package: str) -> set[str]:
    return {module_name(file) for file in FILES if any(m.split(".")[0] == package for m in imports(file))}


def test_one_file_knows_deepspeed() -> None:
    assert who_imports("deepspeed") == {"rlhf.engine"}


def test_collectives_are_called_in_one_place() -> None:
    users = {module_name(f) for f in FILES if any(m.startswith("torch.distributed") for m in imports(f))}
    assert users == {"rlhf.distributed"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("rlhf.config", ["torch", "deepspeed", "transformers", "numpy"]),
        ("rlhf.ops.advantages, rlhf.ops.kl, rlhf.ops.losses, rlhf.ops.logprobs, rlhf.batching", ["deepspeed", "transformers", "peft"]),
        ("rlhf.rewards.worker", ["torch", "numpy", "transformers", "pydantic", "yaml"]),
        ("rlhf.rollout.sampler, rlhf.data, rlhf.models.loading", ["deepspeed"]),
    ],
)
def test_light_modules_stay_light(module: str, absent: list[str]) -> None:
    program = f"import sys\nimport {module}\nprint([name for name in {absent} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=100)
    assert run.stdout.strip() == "[]"
