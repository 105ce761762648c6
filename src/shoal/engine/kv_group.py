"""KV groups: layers that share an attention window also share a pool of pages, and give pages back once no later token sees them."""

from __future__ import annotations

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
