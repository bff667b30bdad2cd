"""Write rows of a recipe's reasoning-gym sources as jsonl, for machines that do not have the package.

python scripts/task_to_jsonl.py --config recipe.yaml --out DIR   ->  DIR/train.jsonl, DIR/validation.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf.config import SourceConfig, load_config
from rlhf.data import read_rows


def write(sources: list[SourceConfig], file: Path) -> int:
    """One JSON object per row; every source must be a task. Returns the number of rows."""
    rows = [row for source in sources for _, row in read_rows(source)]
    with file.open("w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps({"prompt": row["prompt"], "answer": row["answer"], "data_source": row["data_source"]}) + "\n")
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, sources in (("train", config.data.train), ("validation", config.validation.data)):
        print(f"{arguments.out / name}.jsonl: {write(sources, arguments.out / f'{name}.jsonl')} rows")


if __name__ == "__main__":
    main()
