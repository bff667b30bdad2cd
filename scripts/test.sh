#!/usr/bin/env bash
# All checks, quick ones first. --full adds the slow tests. Tests on a GPU: .venv/bin/pytest -m gpu
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

marks="not gpu and not slow"
for argument in "$@"; do
    case "$argument" in
        --full) marks="not gpu" ;;
        *) echo "usage: scripts/test.sh [--full]" >&2; exit 2 ;;
    esac
done

scripts/setup.sh --dev
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
ruff format --check .
mypy

# Two at a time, each file by one worker: most of a test with two ranks is starting them.
parallel=(-n 2 --dist loadfile -m "$marks")
pytest "${parallel[@]}" tests/test_*.py
pytest "${parallel[@]}" tests/distributed tests/e2e tests/chaos

# What a GPU computes in kernels, by Triton's interpreter. The package is large and nothing else needs it, so that it lies apart.
triton="$PWD/.venv/triton"
if [ -d "$triton" ] || pip install --quiet --no-deps --target "$triton" triton==3.6.0; then
    PYTHONPATH="$triton" pytest "${parallel[@]}" tests/distributed/test_kernels.py tests/test_head.py tests/test_fused.py -k "kernels or whole_models"
else
    echo "no Triton for this platform: kernels are not tested"
fi
