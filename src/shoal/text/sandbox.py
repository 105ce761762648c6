"""The process that chat templates run in: one request a line on stdin, one answer a line on stdout.

A template comes out of a downloaded file and may do anything that Jinja allows: nested loops over 10^5 each,
macros that call themselves, strings that double, filters that pad to 10^10. No hook inside the interpreter bounds
all of that, so it is bounded from outside: the parent kills this process when time is up, and the system refuses
it memory. Jinja's immutable sandbox keeps templates from attributes, files and code, and ``main`` takes away the
right to write files.

What a template writes depends on its variables and on what the request says of the world, a moment and a seed: not on the clock,
the time zone or the locale of the machine, nor on what was rendered before.
"""

from __future__ import annotations

import json
import random
import re
import signal
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_OUTPUT = 1 << 24  # characters
MAX_MEMORY = 1 << 29  # bytes of address space
_MAX_REASON = 500
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+(?=>)")


def render(source: str, variables: Mapping[str, Any], now: datetime) -> str:
    """The template's output; ``now`` is what its ``strftime_now`` tells.

    Raises whatever the template raises, jinja2.TemplateError where there is too much of it.
    """
    parts = []
    length = 0
    for part in _compiled(source).generate({"strftime_now": now.strftime, **variables}):
        length += len(part)
        if length > MAX_OUTPUT:
            raise jinja2.TemplateError(f"more than {MAX_OUTPUT} characters of output")
        parts.append(part)
    return "".join(parts)


def problem_of(source: str) -> str | None:
    """Why a template cannot be compiled, and at which line. Only reads it, so it is safe outside the process too."""
    environment = _environment()
    try:
        tree = environment.parse(source)
    except jinja2.TemplateError as problem:
        return _reason(problem)
    except RecursionError:
        return "nested too deeply"
    for kind, known in ((nodes.Filter, environment.filters), (nodes.Test, environment.tests)):
        for node in tree.find_all(kind):
            if node.name not in known:
                return f"line {node.lineno}: no {kind.__name__.lower()} named {node.name!r}"
    return None


def main() -> None:
    """Answer ``{"source", "variables", "now", "seed"}`` with ``{"text"}`` or ``{"error"}``, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    _limit_resources()
    _send("ready")
    for line in sys.stdin.buffer:
        _send(_answer(json.loads(line)))


class _GenerationBlock(Extension):
    """``{% generation %}`` marks the assistant's words for training; for a prompt it means nothing."""

    tags = {"generation"}  # noqa: RUF012 (declared so by the base class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=4)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    """The names and settings that Hugging Face transformers gives templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
        finalize=_without_address,
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _without_address(value: Any) -> Any:
    """A generator or another object that a template writes as it is: where in memory it lies says nothing."""
    if value is None or isinstance(value, (str, int, float, list, tuple, dict, jinja2.Undefined)):
        return value
    return _ADDRESS.sub("", str(value))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """``json.dumps``; unlike Jinja's own filter it does not escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _answer(request: Mapping[str, Any]) -> Mapping[str, str]:
    random.seed(request["seed"])  # for the filter ``random`` and for ``lipsum``
    try:
        return {"text": render(request["source"], request["variables"], datetime.fromisoformat(request["now"]))}
    except jinja2.TemplateError as problem:
        return {"error": _reason(problem)}
    except (
        Exception
    ) as problem:  # whatever template code raises (TypeError, MemoryError, ...) is the template's failure
        return {"error": f"{type(problem).__name__}: {problem}"[:_MAX_REASON]}


def _reason(problem: jinja2.TemplateError) -> str:
    where = f"line {problem.lineno}: " if isinstance(problem, jinja2.TemplateSyntaxError) else ""
    return (where + (problem.message or type(problem).__name__))[:_MAX_REASON]


def _send(answer: object) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


def _limit_resources() -> None:
    """Memory and file writing, where the system has such limits; the parent's clock works everywhere."""
    if sys.platform == "win32":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


if __name__ == "__main__":
    main()
