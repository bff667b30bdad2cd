"""Generated pages are in step with what they are generated from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.config import Config, flat_keys
from scripts import bench_docs, config_docs

RESULT = {
    "bench": "rollout",
    "case": "1.5B",
    "metric": "throughput",
    "value": 28000.0,
    "unit": "tokens/s",
    "machine": "1x H100",
    "versions": "torch 2.11.0",
    "command": "python bench.py | tee log",
    "commit": "abc1234",
    "date": "2026-01-31",
}


def test_configuration_page_is_in_step() -> None:
    assert config_docs.PAGE.read_text(encoding="utf-8") == config_docs.render(), "run scripts/config_docs.py"


def test_configuration_page_has_every_key() -> None:
    page = config_docs.render().replace(".N.", ".")
    assert [key for key in flat_keys(Config) if f"| `{key}` |" not in page] == []


def test_benchmark_page_is_in_step() -> None:
    page = bench_docs.FOLDER.with_suffix(".md")
    assert page.read_text(encoding="utf-8") == bench_docs.render(), "run scripts/bench_docs.py"


def test_benchmark_page_without_results(tmp_path: Path) -> None:
    assert "No results yet." in bench_docs.render(tmp_path)
    (tmp_path / "results.jsonl").touch()
    assert "No results yet." in bench_docs.render(tmp_path)


def test_benchmark_page_groups_and_sorts(tmp_path: Path) -> None:
    rows = [{**RESULT, "case": "7B"}, {**RESULT, "bench": "a|b", "value": 0.25}, RESULT]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "method.md").write_text("## Method\n\nBy hand.\n")
    page = bench_docs.render(tmp_path)
    places = [page.index(text) for text in ("## a|b", "| 0.25 |", "## rollout", "| 1.5B |", "| 7B |", "By hand.") if text != "| 1.5B |"]
    assert places == sorted(places)
    assert "| 28,000 |" in page
    assert page.index("1.5B", page.index("## rollout")) < page.index("| 7B |")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": "fast"}, "value must be a finite number"),
        ({"value": True}, "value must be a finite number"),
        ({"date": "yesterday"}, "date must be"),
        ({"machine": " "}, "machine must be"),
        ({"extra": 1}, "exactly the fields"),
    ],
)
def test_bad_results_are_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    (tmp_path / "results.jsonl").write_text("\n" + json.dumps({**RESULT, **change}) + "\n")
    with pytest.raises(ValueError, match=rf"results.jsonl:2: .*{message}"):
        bench_docs.render(tmp_path)


def test_add_fills_in_commit_and_date(tmp_path: Path) -> None:
    pairs = [f"{key}={value}" for key, value in RESULT.items() if key not in ("commit", "date")]
    bench_docs.add_result(pairs, tmp_path)
    (row,) = bench_docs.read_results(tmp_path / "results.jsonl")
    assert {**row, "commit": "abc1234", "date": "2026-01-31"} == RESULT
    with pytest.raises(ValueError, match="value must be a number"):
        bench_docs.add_result([pair for pair in pairs if not pair.startswith("value=")], tmp_path)
