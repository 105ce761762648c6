"""What a format of tool calls is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from shoal.chat.events import Parsing
from shoal.chat.reader import Reader

# The tools of a request by name, each with its parameters in order and the schemas of these.
Tools: TypeAlias = Mapping[str, Mapping[str, Any]]


class Call(NamedTuple):
    """A call in a conversation: ``arguments`` as an object."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """``parse`` reads a reply; ``write`` spells calls as ``parse`` reads them, for templates that have no words for calls.

    ``example`` tells a model that knows no format how to call. ``marks``: tokens that have to be seen in the text, even where
    they are control tokens. ``around`` gives what stands before and behind the arguments of a call, the first
    mark at its beginning, for the name of a function and the source of the template; None where calls may begin without a mark.
    """

    name: str
    parse: Callable[[Reader, Tools], Parsing[None]]
    write: Callable[[Sequence[Call]], str]
    example: str
    marks: tuple[str, ...] = ()
    around: Callable[[str, str], tuple[str, str]] | None = None
