"""The scorers of reasoning-gym, without the `eval` that some of them hand a model's text to, or sympy's parser for them (trap 28)."""

from __future__ import annotations

import ast
import importlib
import json
import math
import operator
from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import sympy
from reasoning_gym.factory import create_dataset

LONGEST = 10_000  # characters of a formula
MOST_BITS = 100_000  # of a power of whole numbers

_LITERALS = ("algorithmic.binary_matrix", "algorithmic.number_sorting", "algorithmic.spiral_matrix", "algorithmic.string_insertion", "games.n_queens")
_FORMULAS = {
    "algebra.intermediate_integration": "sympy",
    "algebra.polynomial_multiplication": "sp",
    "algebra.simple_integration": "sympy",
    "games.countdown": "parse_expr",
    "games.puzzle24": "parse_expr",
}
_FUNCTIONS = set(
    "sin cos tan cot sec csc asin acos atan acot asec acsc sinh cosh tanh coth asinh acosh atanh exp log ln sqrt cbrt root Abs sign floor "  # noqa: SIM905
    "ceiling".split()
)
_CONSTANTS = ("pi", "E", "I")
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def reasoning_gym(
    prompts: list[str],
    completions: list[str],
    completion_ids: list[list[int]],
    entry: list[dict[str, Any]],
    task: list[str],
    task_config: list[dict[str, Any] | None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """The task's own score of what stands in the last <answer> tags, or of the whole completion; for sources with `task`."""
    configs = task_config or [None] * len(task)
    return [
        float(scorer(name, json.dumps(config or {}, sort_keys=True))(_tagged_answer(text), item))
        for text, item, name, config in zip(completions, entry, task, configs, strict=True)
    ]


def _tagged_answer(text: str) -> str:
    """What stands between the last pair of tags, or all; in one pass, where a pattern would look for each tag's end again."""
    found, end = text, 0
    while (start := text.find("<answer>", end)) >= 0 and (close := text.find("</answer>", start)) >= 0:
        found, end = text[start + len("<answer>") : close], close + len("</answer>")
    return found.strip()


@lru_cache(maxsize=128)
def scorer(task: str, config: str) -> Callable[[str, dict[str, Any]], float]:
    """`score_answer` of a task; config: its keyword arguments as JSON."""
    score: Callable[[str, dict[str, Any]], float] = create_dataset(task, size=1, seed=0, **json.loads(config)).score_answer
    return score


def formula(text: str, local_dict: dict[str, Any] | None = None) -> Any:
    """A sympy expression of numbers, names, + - * / ** and elementary functions, as sympy's parse_expr makes it. ValueError for anything else:
    an integral that is left unsolved is no answer either."""

    def build(node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=bool()):
                pass
            case ast.Constant(value=int(value)):
                return sympy.Integer(value)
            case ast.Constant(value=float(value)) if math.isfinite(value):
                return sympy.Float(ast.get_source_segment(text, node))
            case ast.Name(id=name):
                known = (local_dict or {}).get(name)
                return known if known is not None else getattr(sympy, name) if name in _CONSTANTS else sympy.Symbol(name)
            case ast.BinOp(left=left, op=ast.Pow(), right=right):
                base, exponent = build(left), build(right)
                if base.is_Rational and exponent.is_Integer and int(max(abs(base.p), base.q)).bit_length() * abs(int(exponent)) > MOST_BITS:
                    raise ValueError("too large a power")
                return base**exponent
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](build(left), build(right))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](build(operand))
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
                return getattr(sympy, name)(*map(build, arguments))
        raise ValueError(f"{type(node).__name__} in a formula")

    text = text.strip()
    if len(text) > LONGEST:
        raise ValueError("too long a formula")
    return build(ast.parse(text, mode="eval").body)


# The names as those modules know them, so that `eval` and sympy stay as they are for everybody else.
_SYMPY = SimpleNamespace(**{**vars(sympy), "parse_expr": formula})
for _name in _LITERALS:
    vars(importlib.import_module(f"reasoning_gym.{_name}"))["eval"] = ast.literal_eval
for _name, _attribute in _FORMULAS.items():
    vars(importlib.import_module(f"reasoning_gym.{_name}"))[_attribute] = formula if _attribute == "parse_expr" else _SYMPY
