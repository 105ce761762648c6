"""Pages of a list."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.server.store.paging import Page, PageQuery, page


@dataclass(frozen=True)
class Item:
    id: str


ITEMS = [Item(name) for name in "bdac"]


def names(found: Page[Item]) -> tuple[str, bool]:
    assert (found.first_id, found.last_id) == ((found.data[0].id, found.data[-1].id) if found.data else (None, None))
    return "".join(item.id for item in found.data), found.has_more


def test_the_newest_come_first() -> None:
    assert names(page(ITEMS, PageQuery(3))) == ("dcb", True)
    assert names(page(ITEMS, PageQuery(3, "b"))) == ("a", False)
    assert names(page(ITEMS, PageQuery(4))) == ("dcba", False)


def test_or_the_oldest() -> None:
    assert names(page(ITEMS, PageQuery(2, ascending=True))) == ("ab", True)
    assert names(page(ITEMS, PageQuery(2, "b", ascending=True))) == ("cd", False)


def test_what_a_page_begins_behind_may_be_gone() -> None:
    assert names(page([ITEMS[0], ITEMS[2]], PageQuery(2, "c"))) == ("ba", False)
    assert names(page([], PageQuery(2, "c"))) == ("", False)
