"""PagePool: which pages of KV memory are free. It knows ids only; the arrays belong to the backend."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """A stack of free page ids. Low ids lie on top, so that a small load touches little memory."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._taken = bytearray(num_pages)

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` pages; there must be that many (see ``num_free``)."""
        assert count <= len(self._free), f"{count} pages wanted, {len(self._free)} free"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._taken[page] = 1
        return pages

    def release(self, pages: list[int]) -> None:
        """Give pages back. The first one is the next to be allocated again."""
        for page in reversed(pages):
            assert self._taken[page], f"page {page} released twice"
            self._taken[page] = 0
            self._free.append(page)

    def check(self, owned: Iterable[list[int]]) -> None:
        """Assert that every page is either free or in exactly one of the lists in ``owned``."""
        uses = bytearray(self.num_pages)
        for pages in (self._free, *owned):
            for page in pages:
                assert not uses[page], f"page {page} has two owners"
                uses[page] = 1
        assert all(uses), f"page {uses.index(0)} has leaked"
        assert sum(self._taken) == self.num_pages - len(self._free), "a free page is marked as taken"
