"""PagePool: which pages of KV memory are free, by how many the others are used, and where a known prefix lies.

It knows ids and keys only; the arrays belong to the backend.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain


@dataclass(slots=True)
class Origin:
    """Who filled pages. Others find them once it is ``sound``: a token whose logits hold no NaN has seen what is in them. None: not
    known yet. False: nobody ever will."""

    sound: bool | None = None


class PagePool:
    """Free pages, reference counts, and the pages that are registered under a key.

    A registered page can be found and shared while it is in use and also afterwards, when it counts as free, until it is
    allocated anew. Free pages that hold nothing go first: a stack with low ids on top, so that a small load touches little
    memory. Then the registered ones go, the least recently used first.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # registered and used by no one, least recently used first
        self._uses = [0] * num_pages
        self._pages: dict[bytes, int] = {}
        self._labels: dict[int, tuple[bytes, Origin]] = {}  # of the registered pages

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now."""
        return len(self._free) + len(self._idle)

    @property
    def num_filled(self) -> int:
        """Pages that are in use, or hold something that can be found."""
        return self.num_pages - len(self._free)

    def __contains__(self, key: bytes) -> bool:
        """Whether there is a page to share under ``key``."""
        page = self._pages.get(key)
        return page is not None and self._labels[page][1].sound is True

    def num_idle(self, keys: Iterable[bytes]) -> int:
        """How many of these pages count as free, as long as they are not shared."""
        return sum(self._uses[self._pages[key]] == 0 for key in keys)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` pages; there must be that many (see ``num_free``)."""
        assert count <= self.num_free, f"{count} pages wanted, {self.num_free} free"
        pages = [self._next_free() for _ in range(count)]
        for page in pages:
            self._uses[page] = 1
        return pages

    def share(self, keys: Iterable[bytes]) -> list[int]:
        """Take the pages registered under ``keys``, with whoever else uses them."""
        pages = [self._pages[key] for key in keys]
        for page in pages:
            self._idle.pop(page, None)
            self._uses[page] += 1
        return pages

    def share_pages(self, pages: Iterable[int]) -> None:
        """Take pages that are in use, with whoever else uses them."""
        for page in pages:
            assert self._uses[page], f"page {page} is shared and not in use"
            self._uses[page] += 1

    def register(self, keys: Sequence[bytes], pages: Sequence[int], origin: Origin) -> None:
        """Let pages in use be found under ``keys`` once ``origin`` is sound. A key that leads, or may come to lead, to another page
        stays there."""
        for key, page in zip(keys, pages, strict=True):
            assert self._uses[page], f"page {page} is registered and not in use"
            held = self._pages.get(key)
            if held is not None and self._labels[held][1].sound is False:
                self._forget(held)
            if self._pages.setdefault(key, page) == page:
                self._labels[page] = key, origin

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back. Of those that hold nothing the first is the next to be allocated again, of the others the last."""
        for page in reversed(pages):
            assert self._uses[page], f"page {page} released twice"
            self._uses[page] -= 1
            if self._uses[page]:
                continue
            if page in self._labels:
                self._idle[page] = None
            else:
                self._free.append(page)

    def check(self, owned: Iterable[Sequence[int]]) -> None:
        """Assert that each page is in as many of the lists in ``owned`` as use it, or free in one way."""
        owners = [0] * len(self._uses)
        for page in chain.from_iterable(owned):
            owners[page] += 1
        if owners != self._uses:
            page = next(page for page, uses in enumerate(self._uses) if owners[page] != uses)
            uses = self._uses[page]
            assert owners[page] <= uses, f"page {page} has {owners[page]} owners and {uses} references"
            raise AssertionError(f"page {page} has leaked")
        free = [*self._free, *self._idle]
        assert len(set(free)) == len(free) == self._uses.count(0), "a page has leaked, or is free twice"
        assert not any(map(self._uses.__getitem__, free)), "a page that is used is free"
        assert self._idle.keys() <= self._labels.keys(), "a page that holds nothing is kept"
        assert self._labels.keys().isdisjoint(self._free), "a page that holds something goes first"
        assert {key: page for page, (key, _) in self._labels.items()} == self._pages, "keys and pages disagree"

    def _next_free(self) -> int:
        if not self._free:
            self._forget(next(iter(self._idle)))
        return self._free.pop()

    def _forget(self, page: int) -> None:
        """Let a page be found no more."""
        key, _ = self._labels.pop(page)
        del self._pages[key]
        if page in self._idle:
            del self._idle[page]
            self._free.append(page)
