"""What a model's reply is made of, in the order in which it comes."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeAlias, TypeVar


@dataclass(frozen=True, slots=True)
class Said:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """Text of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins; what follows up to its ``CallEnd`` are its arguments."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of the JSON text of the arguments of the call that was begun last."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call that was begun last is whole. One that the reply breaks off in has no end."""


Event: TypeAlias = Said | Thought | CallStart | Arguments | CallEnd

_T = TypeVar("_T")
# A routine that reads a reply: yields events, and None where it needs more text than there is yet.
Parsing: TypeAlias = Generator[Event | None, None, _T]
# One that only reads: it yields nothing but None.
Reading: TypeAlias = Generator[None, None, _T]
