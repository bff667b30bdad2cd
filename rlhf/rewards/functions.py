"""Reward functions: the registry, and what the trainer knows of one. They run in processes of their own (`pool.py`, trap 27). Imports no torch.

The convention: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, all arguments given by name, one entry per
sample; `None` means that the sample cannot be judged. A function without `**` gets only the arguments it names.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it costs a scoring process more than everything else
    from rlhf.config import RewardComponentConfig

RewardFunction = Callable[..., list[float | None]]

# A minus counts as a sign unless it stands after a word or a bracket: "10-5" ends in 5, "= -5" in -5.
_NUMBER = re.compile(r"(?P<sign>(?<![\w)\]])[-\u2212])?(?:\$\s?)?(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")


def exact_match(prompts: list[str], completions: list[str], completion_ids: list[list[int]], answer: list[Any], **columns: Any) -> list[float | None]:
    """1 if the completion is the `answer` column, but for white space around it."""
    return [None if right is None else float(text.strip() == str(right).strip()) for text, right in zip(completions, answer, strict=True)]


def contains_answer(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], answer: list[Any], **columns: Any
) -> list[float | None]:
    """1 if the completion holds the `answer` column as whole words: 5 is not in 15."""

    def score(text: str, right: Any) -> float | None:
        if right is None or not str(right).strip():
            return None
        return float(re.search(rf"(?<!\w){re.escape(str(right).strip())}(?!\w)", text) is not None)

    return [score(text, right) for text, right in zip(completions, answer, strict=True)]


def last_number(prompts: list[str], completions: list[str], completion_ids: list[list[int]], answer: list[Any], **columns: Any) -> list[float | None]:
    """1 if the last number of the completion equals the last number of the `answer` column; "$1,234.50" reads as 1234.5."""
    return [_same_number(find_number(text), right) for text, right in zip(completions, answer, strict=True)]


def gsm8k(prompts: list[str], completions: list[str], completion_ids: list[list[int]], answer: list[Any], **columns: Any) -> list[float | None]:
    """As `last_number`, but a final `#### x` in the completion is its answer, whatever follows."""
    return [_same_number(_marked_number(text), right) for text, right in zip(completions, answer, strict=True)]


def find_number(text: str) -> Decimal | None:
    """The last number in a text."""
    found = list(_NUMBER.finditer(text))
    return _decimal(found[-1] if found else None)


def _marked_number(text: str) -> Decimal | None:
    _, mark, final = text.rpartition("####")
    marked = _decimal(_NUMBER.match(final.strip())) if mark else None
    return find_number(text) if marked is None else marked


def _decimal(match: re.Match[str] | None) -> Decimal | None:
    if match is None:
        return None
    value = Decimal(match["digits"].replace(",", ""))
    return value.copy_negate() if match["sign"] else value


def _same_number(given: Decimal | None, answer: Any) -> float | None:
    right = None if answer is None else find_number(str(answer))
    return None if right is None else float(given == right)


def length_penalty(
    prompts: list[str], completions: list[str], completion_ids: list[list[int]], target: int, per_token: float = 0.001, **columns: Any
) -> list[float | None]:
    """-per_token for every token above `target`; both are set under `arguments`."""
    return [-per_token * max(0, len(ids) - target) for ids in completion_ids]


REWARD_FUNCTIONS: dict[str, RewardFunction | str] = {
    "exact_match": exact_match,
    "contains_answer": contains_answer,
    "last_number": last_number,
    "gsm8k": gsm8k,
    "reasoning_gym": "rlhf.rewards.reasoning:reasoning_gym",  # needs the package
    "length_penalty": length_penalty,
}


def resolve_function(name: str) -> RewardFunction:
    """A registered name, or `package.module:attribute`. Raises ValueError that names the mend."""
    module_name, colon, attribute = name.partition(":")
    if not colon:
        if name in REWARD_FUNCTIONS:
            registered = REWARD_FUNCTIONS[name]
            return resolve_function(registered) if isinstance(registered, str) else registered
        raise ValueError(f"reward function {name!r}: unknown; {_nearest(name, list(REWARD_FUNCTIONS))}, or give package.module:function")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # the user's module runs here, and may fail in any way
        raise ValueError(f"reward function {name!r}: importing {module_name!r} failed: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [n for n in dir(found) if not n.startswith("_")]
            raise ValueError(f"reward function {name!r}: {module_name} has no {attribute!r}; {_nearest(part, public)}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"reward function {name!r}: is of type {type(found).__name__}; name a function")
    function: RewardFunction = found
    return function


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1, 0.5)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known) or 'none'}"


class FunctionReward:
    """A reward function as a recipe names it. `Pool.score` calls it."""

    def __init__(self, config: RewardComponentConfig) -> None:
        """Raises ValueError if the function is not found or does not take one of `arguments`."""
        assert config.function is not None
        self.name, self.path = config.label, config.function
        self.function = resolve_function(config.function)
        self.arguments = config.arguments
        self._accepted = _accepted_names(self.function)  # None = all
        for key in self.arguments:
            if self._accepted is not None and key not in self._accepted:
                raise ValueError(f"reward function {config.function!r}: takes no argument {key!r}; {_nearest(key, sorted(self._accepted))}")

    def check_columns(self, columns: set[str]) -> None:
        """Raises ValueError if the function needs what is neither a column of the data nor among `arguments`: it would lose every sample."""
        given = {"prompts", "completions", "completion_ids", "source", *columns, *self.arguments}
        for name in sorted(_required_names(self.function) - given):
            near = _nearest(name, sorted(columns | set(self.arguments)))
            raise ValueError(f"reward function {self.name!r}: needs {name!r}, which is no column of the data and not set under `arguments`; {near}")

    def inputs(self, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Those columns that the function takes; what `arguments` sets is no column."""
        return {name: values for name, values in columns.items() if name not in self.arguments and (self._accepted is None or name in self._accepted)}


def _accepted_names(function: RewardFunction) -> set[str] | None:
    """Names of the arguments a function takes, None if it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # built-in without a signature
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _required_names(function: RewardFunction) -> set[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # built-in without a signature
        return set()
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is p.empty}
