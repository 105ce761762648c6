"""Lists of objects, a page at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

import msgspec


class _Named(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=_Named)


@dataclass(frozen=True, slots=True)
class PageQuery:
    """At most ``limit`` objects behind the one called ``after``, the newest first unless ``ascending``."""

    limit: int
    after: str | None = None
    ascending: bool = False


class Page(msgspec.Struct, Generic[T]):
    """Some objects of a list, in OpenAI's shape."""

    data: list[T]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


def page(items: Iterable[T], query: PageQuery) -> Page[T]:
    """The page of ``items`` that is asked for. Their ids are in the order of time, so ``after`` need not be there any more."""
    ordered = sorted(items, key=lambda item: item.id, reverse=not query.ascending)
    if query.after is not None:
        after = query.after
        ordered = [item for item in ordered if (item.id > after if query.ascending else item.id < after)]
    shown = ordered[: query.limit]
    first, last = (shown[0].id, shown[-1].id) if shown else (None, None)
    return Page(shown, first, last, len(ordered) > len(shown))
