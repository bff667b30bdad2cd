"""Forty rows that cannot be used, each in its own way. bytes: a raw line of the file."""

from __future__ import annotations

from typing import Any

MALFORMED: list[Any] = [
    b"",
    b"   ",
    b"not json",
    b'{"prompt": "ab>", "response": "ba"',
    b'{"prompt": "ab>" "response": "ba"}',
    b"{'prompt': 'ab>', 'response': 'ba'}",
    b'{"prompt": "ab>", "response": "ba",}',
    b'{"prompt": "ab>", "response": "ba"} {"prompt": "ab>", "response": "ba"}',
    b'{"prompt": "ab\xff>", "response": "ba"}',
    b'{"prompt": "ab>\x00", "response": "ba"}',
    b'{"prompt": "ab>", "prompt": "cd>", "response": "ba"}',
    b'{"prompt": "ab>", "response": NaN}',
    b'{"prompt": "ab>", "response": "ba", "weight": Infinity}',
    b'{"prompt": "ab>", "response": "ba", "weight": 1e999}',
    b'{"prompt": "ab>\\ud800", "response": "ba"}',
    b"[" * 100_000,
    b"1" * 5000,
    b"null",
    b"true",
    b"3.5",
    b'"ab>"',
    b'["ab>", "ba"]',
    b"[]",
    b"{}",
    {"prompt": "ab>"},
    {"response": "ba"},
    {"Prompt": "ab>", "response": "ba"},
    {"prompt": None, "response": "ba"},
    {"prompt": "ab>", "response": None},
    {"prompt": "", "response": "ba"},
    {"prompt": " \n", "response": "ba"},
    {"prompt": "ab>", "response": ""},
    {"prompt": 12, "response": "ba"},
    {"prompt": "ab>", "response": 12},
    {"prompt": {"text": "ab>"}, "response": "ba"},
    {"prompt": ["ab>"], "response": "ba"},
    {"prompt": [], "response": "ba"},
    {"prompt": [{"role": "user"}], "response": "ba"},
    {"prompt": [{"role": "robot", "content": "ab>"}], "response": "ba"},
    {"prompt": [{"role": "user", "content": 5}], "response": "ba"},
]

assert len(MALFORMED) == 40
