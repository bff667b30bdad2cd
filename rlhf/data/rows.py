"""What every loader shares: a problem of one row, the checks of a row's fields, and the report of what was kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rlhf.config import DataConfig, SourceConfig

ROLES = ("system", "developer", "user", "assistant", "tool")
SHOWN_PROBLEMS = 10

Row = dict[str, Any]
Message = dict[str, Any]
T = TypeVar("T")


class RowProblem(ValueError):
    """One row cannot be used. `reason` is the short name it is counted under, the message names the key and the mend."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Dropped(Exception):
    """A sound row that the config leaves out (too long). Counted, never an error."""


@dataclass
class SourceReport:
    """What became of the rows of one source."""

    name: str
    rows: int = 0  # kept
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> rows left out
    truncated: int = 0  # kept, but cut to data.max_prompt_tokens

    def summary(self) -> str:
        parts = [f"{self.name}: {self.rows} rows"]
        if self.truncated:
            parts.append(f"{self.truncated} truncated")
        parts += [f"{count} dropped ({reason})" for reason, count in self.dropped.most_common()]
        return ", ".join(parts)


@dataclass
class DataReport:
    """What became of the rows, source by source in the order of the config."""

    sources: list[SourceReport] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return sum(source.rows for source in self.sources)

    @property
    def dropped(self) -> Counter[str]:
        return sum((source.dropped for source in self.sources), Counter())

    @property
    def truncated(self) -> int:
        return sum(source.truncated for source in self.sources)

    def summary(self) -> str:
        """One line per source."""
        return "\n".join(source.summary() for source in self.sources)


def build_rows(
    sources: list[SourceConfig],
    data: DataConfig,
    read: Callable[[SourceConfig], Iterable[tuple[str, Row | RowProblem]]],
    build: Callable[[SourceConfig, Row, SourceReport], T],
) -> tuple[list[T], DataReport]:
    """Every row of every source through `build`, which raises RowProblem or Dropped for those that cannot be used.

    Raises one ValueError for all bad rows together (`data.on_bad_row: error`), or if no row is left.
    """
    items: list[T] = []
    report = DataReport()
    shown: list[str] = []
    problems: Counter[str] = Counter()
    for source in sources:
        counts = SourceReport(source.label)
        report.sources.append(counts)
        for location, row in read(source):
            try:
                if isinstance(row, RowProblem):
                    raise row
                check_numbers(row)
                items.append(build(source, row, counts))
                counts.rows += 1
            except Dropped as reason:
                counts.dropped[str(reason)] += 1
            except RowProblem as problem:
                counts.dropped[problem.reason] += 1
                problems[problem.reason] += 1
                if len(shown) < SHOWN_PROBLEMS:
                    shown.append(f"  {location}: {problem}")
    total = problems.total()
    if total and data.on_bad_row == "error":
        if total > len(shown):
            shown.append(f"  ... and {total - len(shown)} more")
        by_reason = ", ".join(f"{reason} {count}" for reason, count in problems.most_common())
        raise ValueError("\n".join([f"{total} bad rows ({by_reason}); mend them, or leave them out with data.on_bad_row=skip:", *shown]))
    if not items:
        raise ValueError(f"no usable row is left:\n{report.summary()}")
    return items, report


def check_numbers(row: Row) -> None:
    """NaN and infinity anywhere in the row would reach a reward function as ground truth."""
    for key, value in row.items():
        if any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in _leaves(value)):
            raise RowProblem("NaN", f"`{key}` holds NaN or infinity; write a number or null")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def take(row: Row, key: str, option: str) -> Any:
    """The value under `key`, which the config's `option` names; missing and null are problems."""
    if key not in row:
        raise RowProblem("missing key", f"`{key}` is missing; the row has {', '.join(row) or 'no columns'}; set {option} to the column to use")
    if row[key] is None:
        raise RowProblem("null", f"`{key}` is null; fill it in or remove the row")
    return row[key]


def check_text(value: Any, key: str, what: str) -> str:
    """A text that can be tokenised and says something. `what` (prompt, response, message) names the reason."""
    if not isinstance(value, str):
        raise RowProblem("wrong type", f"`{key}` is of type {type(value).__name__}; it must be text")
    if not value.strip():
        raise RowProblem(f"empty {what}", f"`{key}` is empty; write the {what} or remove the row")
    if "\0" in value:
        raise RowProblem("null byte", f"`{key}` holds a null byte (\\u0000); remove it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowProblem("not UTF-8", f"`{key}` holds bytes or surrogates that are not valid UTF-8; save the file as UTF-8") from None
    return value


def check_text_or_messages(value: Any, key: str, what: str) -> str | list[Message]:
    if isinstance(value, list):
        return check_messages(value, key, what)
    if not isinstance(value, str):
        raise RowProblem("wrong type", f"`{key}` is of type {type(value).__name__}; it must be text or a list of {{role, content}}")
    return check_text(value, key, what)


def check_messages(value: list[Any], key: str, what: str) -> list[Message]:
    """A conversation: a non-empty list of {role, content} with known roles and text contents. Further fields go to the template."""
    if not value:
        raise RowProblem(f"empty {what}", f"`{key}` is an empty list; write at least one message")
    for index, message in enumerate(value):
        where = f"{key}[{index}]"
        if not isinstance(message, dict):
            raise RowProblem("wrong type", f"`{where}` is of type {type(message).__name__}; it must be an object {{role, content}}")
        for name in ("role", "content"):
            if message.get(name) is None:
                raise RowProblem(f"{name} missing", f"`{where}` has no `{name}`; a message is {{role, content}}")
        if message["role"] not in ROLES:
            raise RowProblem("unknown role", f"`{where}.role` is {message['role']!r}; use one of {', '.join(ROLES)}")
        check_text(message["content"], f"{where}.content", "message")
    return value
