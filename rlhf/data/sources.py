"""Rows out of files and task generators, each with the place it came from. Nothing is tokenised here."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import gzip
import io
import json
import random
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from rlhf.config import SourceConfig, unique_keys
from rlhf.data.rows import Row, RowProblem

DEFAULT_TASK_SIZE = 1000
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")

Located = tuple[str, Row | RowProblem]


def read_rows(source: SourceConfig) -> Iterator[Located]:
    """(location, row) for each of the first `source.size` rows; a row that cannot be read comes as a RowProblem.

    Locations are `file.jsonl:12` (line) for jsonl and csv, `file.parquet:row 12` (from 1) for the others.
    Raises ValueError if the source as a whole cannot be read.
    """
    if source.task is not None:
        return _read_task(source, source.task)
    assert source.path is not None  # SourceConfig has exactly one of both
    return islice(_read_path(source.path), source.size)


def _read_path(path: Path) -> Iterator[Located]:
    if path.is_dir():
        yield from _read_saved(path)
        return
    name = path.name.lower()
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings, 1)
        mend = f"did you mean {path.parent / close[0]}?" if close else "give the path of a file, from where the program is started"
        raise ValueError(f"data source path={path}: no such file; {mend}")
    if suffix is None:
        raise ValueError(f"data source path={path}: unknown suffix {path.suffix!r}; use {', '.join(SUFFIXES)} or a folder of datasets.save_to_disk")
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    try:
        yield from readers[suffix.removesuffix(".gz")](path)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"data source path={path}: cannot be read: {error}") from None


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else path.open("rb")


def _read_jsonl(path: Path) -> Iterator[Located]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            yield f"{path.name}:{number}", _parse_line(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)


def _parse_line(line: bytes) -> Row | RowProblem:
    if not line.strip():
        return RowProblem("blank line", "blank line; remove it")
    if b"\0" in line:
        return RowProblem("null byte", "the line holds a null byte; remove it")
    try:
        row = _parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowProblem("not UTF-8", f"byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8")
    except RowProblem as problem:
        return problem
    except json.JSONDecodeError as error:
        return RowProblem("invalid JSON", f"not valid JSON: {error.msg} at column {error.colno}; one JSON object a line")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, endless nesting
        return RowProblem("invalid JSON", f"not readable JSON: {error}")
    return _as_row(row)


def _parse_json(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)


def _refuse_constant(constant: str) -> NoReturn:
    raise RowProblem("NaN", f"{constant} is not JSON; write a number or null")


def _unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    try:
        return unique_keys(pairs)
    except ValueError as error:
        raise RowProblem("duplicate key", str(error)) from None


def _as_row(value: Any) -> Row | RowProblem:
    if isinstance(value, dict):
        return value
    return RowProblem("not an object", f"the row is of type {type(value).__name__}; it must be an object of columns")


def _read_json(path: Path) -> Iterator[Located]:
    try:
        with _open(path) as file:
            rows = _parse_json(file.read().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}; for one object a line the suffix is .jsonl") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: holds one {type(rows).__name__}; a .json source is a list of objects")
    for number, row in enumerate(rows, 1):
        yield f"{path.name}:row {number}", _as_row(row)


def _read_csv(path: Path) -> Iterator[Located]:
    # Undecodable bytes become surrogates here, so that the checks blame their row only.
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        if not reader.fieldnames:
            raise ValueError(f"{path}: no header line; the first line of a .csv source names the columns")
        while True:
            try:
                row: Row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield f"{path.name}:{reader.line_num}", RowProblem("invalid CSV", f"not valid CSV: {error}")
                continue
            ragged = None in row or None in row.values()
            problem = RowProblem("invalid CSV", f"the line has not the header's {len(reader.fieldnames)} fields; quote fields that hold commas")
            yield f"{path.name}:{reader.line_num}", problem if ragged else row


def _read_parquet(path: Path) -> Iterator[Located]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for index in range(batch.num_rows):
                number += 1
                try:
                    row: Row | RowProblem = batch.slice(index, 1).to_pylist()[0]
                except UnicodeDecodeError:
                    row = RowProblem("not UTF-8", "a text column holds bytes that are not UTF-8; write the file from valid text")
                yield f"{path.name}:row {number}", row
    except pyarrow.ArrowException as error:
        raise ValueError(f"data source path={path}: not a readable parquet file: {error}") from None


def _read_saved(path: Path) -> Iterator[Located]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise ValueError(f"data source path={path}: the folder was not written by datasets.save_to_disk; name a file inside it") from None
    except Exception as error:  # files of the folder that are not what they should be
        raise ValueError(f"data source path={path}: cannot be read: {type(error).__name__}: {error}") from None
    if isinstance(dataset, datasets.DatasetDict):
        raise ValueError(f"data source path={path}: holds the splits {', '.join(dataset)}; name one, e.g. {path / next(iter(dataset))}")
    for number, row in enumerate(dataset, 1):
        yield f"{path.name}:row {number}", row


def _read_task(source: SourceConfig, task: str) -> Iterator[Located]:
    """Rows with `prompt`, `answer`, `metadata`, `data_source`; `task`, `task_config` and `entry` are what the task's scorer needs."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        raise ValueError(f"data source task={task}: the package reasoning-gym is not installed; pip install reasoning-gym") from None
    if task not in DATASETS:
        close = difflib.get_close_matches(task, DATASETS, 1, 0.5)
        raise ValueError(f"data source task={task}: unknown; {f'did you mean {close[0]}?' if close else 'reasoning_gym.factory.DATASETS lists all'}")
    known = [f.name for f in dataclasses.fields(DATASETS[task][1]) if f.init and f.name not in ("seed", "size")]
    for key in source.task_config:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1, 0.5)
            mend = f"did you mean {close[0]}?" if close else f"it takes {', '.join(known)}"
            if key in ("seed", "size"):
                mend = "set it on the source itself"
            raise ValueError(f"data source task={task}: unknown task_config.{key}; {mend}")
    size = source.size or DEFAULT_TASK_SIZE
    try:
        dataset = create_dataset(task, size=size, seed=source.seed, **source.task_config)
    except Exception as error:  # each task checks its own values, by assert and by whatever else
        raise ValueError(f"data source task={task}: task_config={source.task_config} is refused: {error}") from None
    for index in range(size):
        random.seed(source.seed + index)  # some tasks draw from the global generator besides their own
        entry = dataset[index]
        yield (
            f"{task}:row {index + 1}",
            {
                "prompt": entry["question"],
                "answer": entry["answer"],
                "metadata": entry["metadata"],
                "data_source": task,
                "task": task,
                "task_config": source.task_config,
                "entry": entry,
            },
        )
