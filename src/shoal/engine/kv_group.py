"""KV groups: layers that share an attention window also share a pool of pages, and give pages back once no later token sees them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shoal.engine.page_pool import PagePool


@dataclass(frozen=True, slots=True)
class PageUse:
    """What one sequence holds of the pages of a group: all of its positions, or with a ``window`` > 0 those that the tokens still to
    be computed see (a token sees the last ``window`` positions, its own among them). ``chunk``: most tokens of a step."""

    page_size: int
    chunk: int
    window: int = 0

    def num_passed(self, num_computed: int) -> int:
        """How many of the first pages no later token sees, once so many tokens are computed."""
        if not self.window:
            return 0
        return max(0, num_computed - self.window + 1) // self.page_size

    def most_pages(self, tokens: int) -> int:
        """The most that a sequence holds at once on its way to so many tokens."""
        return self._seen(tokens, self.chunk)

    def settled_pages(self, tokens: int) -> int:
        """The most that a sequence of so many tokens holds while it computes one at a time."""
        return self._seen(tokens, 1)

    def most_tokens(self, pages: int, longest: int) -> int:
        """The longest sequence, up to ``longest`` tokens, that so many pages are enough for."""
        return longest if self.most_pages(longest) <= pages else pages * self.page_size

    def _seen(self, tokens: int, chunk: int) -> int:
        """Pages under the positions that a chunk sees; those may begin at the end of a page."""
        whole = -(-tokens // self.page_size)
        if not self.window:
            return whole
        return min(whole, (self.window - 1 + chunk + self.page_size - 2) // self.page_size + 1)


@dataclass(frozen=True, slots=True)
class PageGroup:
    """The pages of one group, and what a sequence holds of them."""

    pool: PagePool
    use: PageUse

    def held(self, count: int) -> range:
        """Which of its first ``count`` pages a sequence still holds once it has computed all of them and nothing more."""
        return range(self.use.num_passed(count * self.use.page_size), count)

    def has_room(self, tokens: int, keys: Sequence[bytes]) -> bool:
        """Whether a sequence of ``tokens`` tokens fits that begins with the registered pages ``keys``."""
        idle = self.pool.num_idle(keys[index] for index in self.held(len(keys)))
        rest = -(-tokens // self.use.page_size) - len(keys)
        return min(self.use.most_pages(tokens), rest + idle) <= self.pool.num_free

    def share(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of a sequence that begins with the registered pages ``keys``; 0 in place of those that it does not hold."""
        held = self.held(len(keys))
        return [0] * held.start + self.pool.share(keys[index] for index in held)


def longest_prefix(groups: Sequence[PageGroup], keys: Sequence[bytes]) -> int:
    """How many of the pages ``keys`` a sequence can begin with: the most for which every group has the pages that it would hold."""
    count = len(keys)
    while (missing := _first_missing(groups, keys[:count])) is not None:
        count = missing  # as every larger count up to the last one needs this page too
    return count


def _first_missing(groups: Iterable[PageGroup], keys: Sequence[bytes]) -> int | None:
    return next((i for group in groups for i in group.held(len(keys)) if keys[i] not in group.pool), None)
