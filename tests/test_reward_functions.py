"""Reward functions against hand-checked answers, and trap 27: a failing function costs only the samples it failed on."""

import json
import sys
import types
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.config import RewardComponentConfig, SourceConfig
from rlhf.data import read_rows
from rlhf.rewards.functions import REWARD_FUNCTIONS, FunctionReward, find_number, resolve_function
from rlhf.rewards.worker import judge


def call(name: str, completions: list[str], **columns: Any) -> list[float | None]:
    return resolve_function(name)(prompts=["?"] * len(completions), completions=completions, completion_ids=[[1]] * len(completions), **columns)


@pytest.fixture
def wrap(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FunctionReward]:
    def build(function: Any, **arguments: Any) -> FunctionReward:
        module = types.ModuleType("user_rewards")
        module.mine = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "user_rewards", module)
        return FunctionReward(RewardComponentConfig(function="user_rewards:mine", arguments=arguments))

    return build


def score(reward: FunctionReward, completions: list[str], **columns: list[Any]) -> tuple[list[float | None], dict[str, int]]:
    """As the scoring process does it, in this one."""
    own = {"prompts": ["p"] * len(completions), "completions": completions, "completion_ids": [[ord(c) for c in text] for text in completions]}
    found = list(judge(reward.function, reward.inputs({**columns, **own}), reward.arguments, len(completions), 0, True))
    results = found[0].get("all") or [answer["one"] for answer in found if "one" in answer]
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    return [r if isinstance(r, float) else None for r in results], dict(Counter(r for r in results if isinstance(r, str)))


# ---- registered functions


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 apples and 12 pears.", "12"),
        ("The total is $1,234.50.", "1234.50"),
        ("so x = -5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("10-5", "5"),
        ("between (3)-7", "7"),
        ("answer: \u22127", "-7"),
        ("1,2,3", "3"),
        ("2024,100", "100"),
        ("12,345,678!", "12345678"),
        ("about .5", ".5"),
        ("50%", "50"),
        ("x15", "15"),
        ("none at all", None),
        ("", None),
    ],
)
def test_find_number(text: str, number: str | None) -> None:
    assert find_number(text) == (None if number is None else Decimal(number))


def test_last_number() -> None:
    completions = ["It is 72.", "It is 72.0", "72, no: 71", "none", "$1,000", "42"]
    assert call("last_number", completions, answer=["72", 72, "72", "72", "1000.", "no number"]) == [1, 1, 0, 0, 1, None]


def test_gsm8k_takes_the_marked_number_then_the_last() -> None:
    completions = ["... #### 72\nI am 100% sure", "it is 72", "#### nothing, 72", "#### 71 or 72", "#### $1,072.00"]
    assert call("gsm8k", completions, answer=["work\n#### 72", "72", "72", "72", "1,072"]) == [1, 1, 1, 0, 1]


def test_exact_match_and_contains_answer() -> None:
    assert call("exact_match", [" Paris\n", "paris", "5", "x"], answer=["Paris", "Paris", 5, None]) == [1, 0, 1, None]
    completions = ["It is Paris.", "15", "so 5!", "c++ rules", "x", "a.c"]
    assert call("contains_answer", completions, answer=["Paris", 5, 5, "c++", "", "abc"]) == [1, 0, 1, 1, None, 0]


def test_length_penalty_is_linear_above_target() -> None:
    reward = FunctionReward(RewardComponentConfig(function="length_penalty", arguments={"target": 3, "per_token": 0.5}))
    assert score(reward, ["", "abc", "abcd", "abcdef"]) == ([0, 0, -0.5, -1.5], {})


def test_reasoning_gym_scores_its_own_entries() -> None:
    rows = [row for _, row in read_rows(SourceConfig(task="chain_sum", size=3, seed=1, task_config={"max_terms": 3}))]
    assert all(isinstance(row, dict) for row in rows)
    columns = {name: [row[name] for row in rows if isinstance(row, dict)] for name in ("entry", "task", "task_config", "answer")}
    right = columns["answer"]
    completions = [right[0], f"I think <answer>1</answer>, no: <answer> {right[1]} </answer>", "no idea"]
    scores = call("reasoning_gym", completions, **columns)
    assert scores[:2] == [1, 1]
    assert scores[2] is not None and scores[2] < 0.1


def test_what_stands_in_the_last_tags() -> None:
    from rlhf.rewards.reasoning import _tagged_answer

    for text, found in [
        ("<answer>1</answer> no <answer> 2\n</answer> or <answer>3", "2"),
        ("<answer>1<answer>2</answer></answer>", "1<answer>2"),
        ("</answer> 1 <answer>", "</answer> 1 <answer>"),
        ("<answer></answer>", ""),
        (" 7 ", "7"),
    ]:
        assert _tagged_answer(text) == found


def test_formulas_are_what_sympy_reads_without_evaluating_text() -> None:
    import sympy

    from rlhf.rewards.reasoning import formula

    x = sympy.Symbol("x")
    for text in ("3 + 4*2", "-2**2", "8 / 3 / 2", " 2*x**3 - 1.50*x + C", "exp(-x/2)*sin(3*x)", "sqrt(pi) - E*I", "2**-3", "log(x, 2)", "0**0"):
        assert formula(text, {"x": x}) == sympy.parse_expr(text.strip(), local_dict={"x": x}), text
    refused = ["x.y", "x[0]", "(1, 2)", "'a'", "True", "lambda: 1", "Symbol('y')", "x if x else x", "1 < 2", "x = 1", "7 // 2", ""]
    for text in [*refused, "10**10**10", "1e999"]:
        with pytest.raises((ValueError, SyntaxError)):
            formula(text)
    assert sympy.parse_expr("x if x else y", evaluate=True) == x, "sympy itself is as it was"


# ---- finding functions


def test_unknown_names_are_refused_with_the_nearest() -> None:
    assert resolve_function("gsm8k") is REWARD_FUNCTIONS["gsm8k"]
    assert callable(resolve_function("reasoning_gym"))
    assert resolve_function("math:sqrt")(4) == 2
    for name, message in [
        ("exact_macth", "did you mean 'exact_match'"),
        ("no_such_module_here:f", "importing 'no_such_module_here' failed: ModuleNotFoundError"),
        ("math:sqrtt", "did you mean 'sqrt'"),
        ("math:pi", "is of type float; name a function"),
    ]:
        with pytest.raises(ValueError, match=message):
            resolve_function(name)


def test_argument_that_the_function_does_not_take_is_refused(wrap: Callable[..., FunctionReward]) -> None:
    def mine(completions: list[str], scale: float) -> list[float]:
        return [scale] * len(completions)

    assert score(wrap(mine, scale=2.0), ["a"]) == ([2], {})
    with pytest.raises(ValueError, match="takes no argument 'scal'; did you mean 'scale'"):
        wrap(mine, scal=2.0)


def test_function_without_kwargs_gets_only_what_it_names(wrap: Callable[..., FunctionReward]) -> None:
    def mine(completions: list[str], answer: list[str]) -> list[bool]:
        return [a == b for a, b in zip(completions, answer, strict=True)]

    scores, failures = score(wrap(mine), ["a", "b"], answer=["a", "a"], other=[1, 2], prompts=["a column called prompts", ""])
    assert (scores, failures) == ([1, 0], {})


# ---- trap 27


def test_trap_27_raises_for_one_sample(wrap: Callable[..., FunctionReward]) -> None:
    def mine(completions: list[str], **columns: Any) -> list[float]:
        return [1 / len(text) for text in completions]

    reward = wrap(mine)
    assert score(reward, ["a", "", "ab", ""]) == ([1, None, 0.5, None], {"raised ZeroDivisionError": 2})
    assert score(reward, [""]) == ([None], {"raised ZeroDivisionError": 1})


def test_trap_27_bad_entries_cost_their_samples_only(wrap: Callable[..., FunctionReward]) -> None:
    values = [
        None,
        float("nan"),
        float("inf"),
        -float("inf"),
        "1.0",
        [1.0],
        {},
        1j,
        10**400,
        1e308,
        -3.5e38,
        object(),
        torch.ones(2),
        True,
        2,
        np.float32(0.5),
        np.bool_(True),
    ]
    values += [torch.tensor(0.25), 0.75]
    scores, failures = score(wrap(lambda completions: [values[int(i)] for i in completions]), [str(i) for i in range(len(values))])
    assert scores == [None] * 13 + [1, 2, 0.5, 1, 0.25, 0.75]
    assert all(type(value) is float for value in scores[13:])
    assert failures == {"None": 1, "NaN": 1, "infinite": 3, "beyond float32": 2, "not a number": 6}


def test_trap_27_wrong_length_for_one_sample(wrap: Callable[..., FunctionReward]) -> None:
    reward = wrap(lambda completions, **_: [1.0 for text in completions if text])
    assert score(reward, ["a", "", "b"]) == ([1, None, 1], {"wrong length": 1})


@pytest.mark.parametrize("result", [None, 1.0, "ab", {"a": 1, "b": 2}, {1, 2}, iter([1, 2])])
def test_trap_27_wrong_type(wrap: Callable[..., FunctionReward], result: Any) -> None:
    scores, failures = score(wrap(lambda **_: result), ["a", "b"])
    assert scores == [None, None]
    assert failures == {f"returned {type(result).__name__} instead of a list": 2}


def test_trap_27_a_function_that_eats_its_input(wrap: Callable[..., FunctionReward]) -> None:
    def mine(completions: list[str], **columns: Any) -> list[float]:
        size = len(completions)
        completions.clear()
        return [1.0] * (size if size == 1 else 0)

    completions = ["a", "b"]
    assert score(wrap(mine), completions) == ([1, 1], {})
    assert completions == ["a", "b"]


def test_trap_27_missing_column_loses_the_batch_but_not_the_run(wrap: Callable[..., FunctionReward]) -> None:
    assert score(FunctionReward(RewardComponentConfig(function="gsm8k")), ["1", "2"]) == ([None, None], {"raised TypeError": 2})


@pytest.mark.parametrize("error", [GeneratorExit, RecursionError, KeyboardInterrupt, SystemExit])
def test_no_exception_escapes(wrap: Callable[..., FunctionReward], error: type[BaseException]) -> None:
    def mine(**_: Any) -> list[float]:
        raise error

    assert score(wrap(mine), ["a"]) == ([None], {f"raised {error.__name__}": 1})


def test_arrays_and_tensors_are_lists_too_and_an_empty_batch_is_fine(wrap: Callable[..., FunctionReward]) -> None:
    assert score(wrap(lambda completions: np.array([0.5, 1.0])), ["a", "b"]) == ([0.5, 1], {})
    assert score(wrap(lambda completions: torch.tensor([0.5, float("nan")])), ["a", "b"]) == ([0.5, None], {"NaN": 1})
    assert score(wrap(lambda completions: []), []) == ([], {})
