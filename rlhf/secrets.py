"""What is secret is neither written nor printed. It is known by its name, in a recipe or in the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from typing import Any

HIDDEN = "***"
_SECRET = {"apikey", "auth", "authorization", "bearer", "credential", "credentials", "passphrase", "passwd", "password"}
_SECRET |= {"passwords", "secret", "secrets"}
_MAYBE = {"key", "keys", "token", "tokens"}  # secret where the value looks like it: `answer_key: final`, `stop_tokens: [2]` are none
_LOOKS = re.compile(r"(?=.*\d)\S{12,}")
_LOGIN = re.compile(r"(?<=://)[^\s/@'\"]+(?=@)")  # of an address
_SHORTEST = 8  # characters of a value that is looked for in messages: shorter ones are words of them by chance

known: set[str] = set()  # values that a recipe has under such names


def masked(tree: Any, own: Collection[str] = (), take: Callable[[Any], Any] = lambda value: HIDDEN) -> Any:
    """A copy of mappings and lists with `***` in the place of values whose names say that they are secret, and of logins in addresses.

    own: names that mean something else here. take: what stands in the place of a value."""

    def walk(value: Any, words: set[str]) -> Any:
        if isinstance(value, dict):
            return {name: walk(part, words | (set() if name in own else _words(str(name)))) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [walk(part, words) for part in value]
        if isinstance(value, str):
            if words & _SECRET or (words & _MAYBE and ("api" in words or _LOOKS.fullmatch(value))):
                return take(value)
            return _LOGIN.sub(lambda login: str(take(login[0])), value)
        return take(value) if words & _SECRET and isinstance(value, int) and not isinstance(value, bool) else value

    return walk(tree, set())


def secrets_in(tree: Any, own: Collection[str] = ()) -> list[Any]:
    """What `masked` hides."""
    found: list[Any] = []
    masked(tree, own, lambda value: found.append(value) or HIDDEN)  # type: ignore[func-returns-value]
    return found


def scrub(text: str) -> str:
    """A message without the secrets that this process knows: of others (libraries, reward functions) that may have put them there."""
    values = known | {value for name, value in os.environ.items() if _words(name) & (_SECRET | _MAYBE)}
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= _SHORTEST:
            text = text.replace(value, HIDDEN)
    return _LOGIN.sub(HIDDEN, text)


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()))
