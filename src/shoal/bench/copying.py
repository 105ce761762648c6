"""Prompts whose answers take up their prompt: code to be changed, lines to be found. And ordinary questions, whose answers do not."""

from __future__ import annotations

import bisect
import colorsys
import fnmatch
import heapq
import inspect
import posixpath
import random
import shlex
import statistics
import string
import textwrap
from collections.abc import Iterator
from itertools import chain, zip_longest
from types import FunctionType, ModuleType

_MODULES: tuple[ModuleType, ...] = (
    textwrap,
    heapq,
    posixpath,
    statistics,
    bisect,
    shlex,
    fnmatch,
    string,
    colorsys,
)  # of pure Python, with short functions
_LINES = range(6, 26)  # of a function
_EDITS = (
    "Add a one-line comment at the top of this function and give back the whole function",
    "Give back this function unchanged, in a code block",
    "Rename the function to `renamed` and give back all of its code",
)
_QUESTIONS = tuple(
    f"{question} {subject}?"
    for question in ("What is the use of", "What should a beginner know about", "Who first thought about")
    for subject in (
        "a rainbow", "bread", "the moon", "chess", "a compass", "volcanoes", "honey", "bicycles", "maps", "clocks",
        "tea", "glass", "wolves", "bridges",
    )
)  # fmt: skip

LOOP, TIMES = 8, 3


def loops(answer: list[int]) -> bool:
    """Whether some 8 tokens in a row come three times or more in an answer: it says the same over and over, which anybody can guess."""
    seen: dict[tuple[int, ...], int] = {}
    for place in range(len(answer) - LOOP + 1):
        gram = tuple(answer[place : place + LOOP])
        seen[gram] = seen.get(gram, 0) + 1
    return max(seen.values(), default=0) >= TIMES


def copying() -> list[str]:
    """Code to be changed and lines to be found, in turns."""
    pairs = zip_longest(_edits(), _extractions(60))
    return [prompt for prompt in chain.from_iterable(pairs) if prompt is not None]


def questions() -> list[str]:
    """Whose answers do not take up much of them."""
    return list(_QUESTIONS)


def _edits() -> Iterator[str]:
    for index, code in enumerate(_functions()):
        yield f"{_EDITS[index % len(_EDITS)]}:\n\n```python\n{code}```"


def _functions() -> Iterator[str]:
    """Short functions of Python's own library."""
    for module in _MODULES:
        for _, function in inspect.getmembers(module, inspect.isfunction):
            code = _code(function) if function.__module__ == module.__name__ else ""
            if len(code.splitlines()) in _LINES:
                yield code


def _code(function: FunctionType) -> str:
    try:
        return textwrap.dedent(inspect.getsource(function))
    except OSError:  # made while Python runs
        return ""


def _extractions(count: int) -> Iterator[str]:
    """Lines of a log, of which those with one word are wanted."""
    rng = random.Random(1)
    names = ("disk", "mail", "login", "backup", "printer", "router")
    for _ in range(count):
        lines = [
            f"{rng.randrange(24):02}:{rng.randrange(60):02} {rng.choice(('ERROR', 'INFO', 'WARN'))} "
            f"{rng.choice(names)} {rng.randrange(1000, 9999)} took {rng.randrange(900)} ms"
            for _ in range(14)
        ]
        wanted = rng.choice(names)
        yield f"Copy all lines with the word {wanted} from this log:\n\n" + "\n".join(lines)
