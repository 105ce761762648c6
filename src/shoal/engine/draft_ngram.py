"""Drafts from the text itself: what followed its last few tokens the last time they came (vLLM's ngram, prompt lookup)."""

from __future__ import annotations

from collections.abc import Sequence as Row

from shoal.engine.draft import Wanted

Grams = dict[tuple[int, ...], int]


class NgramDrafter:
    """Looks for the last ``most`` tokens of a text, then fewer, down to ``least``, in what came before them."""

    def __init__(self, longest: int, least: int, most: int) -> None:
        self.longest = longest
        self._sizes = range(most, least - 1, -1)
        self._texts: dict[object, NgramIndex] = {}

    def draft(self, wanted: Row[Wanted]) -> list[list[int]]:
        """A draft for each."""
        return [self._index(one.key).draft(one.token_ids, one.most) for one in wanted]

    def ended(self, key: object, output: list[int]) -> None:
        """Forget a text."""
        self._texts.pop(key, None)

    def _index(self, key: object) -> NgramIndex:
        found = self._texts.get(key)
        if found is None:
            found = self._texts[key] = NgramIndex(self._sizes)
        return found


class NgramIndex:
    """Where the n-grams of one text, which grows, came last. Each token is taken in once, when a draft is asked for."""

    def __init__(self, sizes: range) -> None:
        self._sizes = sizes
        self._grams: list[Grams] = [{} for _ in sizes]  # to the place of the token behind the n-gram
        self._known = 0  # so many tokens were there at the last call
        self.source = 0  # from where its draft was taken; 0: there was none

    def draft(self, tokens: list[int], most: int) -> list[int]:
        """What may follow ``tokens``, which begin with those of the last call. A text that repeats itself is taken to go on so."""
        place = self._followed(tokens)
        self._take(tokens)
        self.source = place = place or self._found(tokens)
        if not place:
            return []
        draft = tokens[place : place + most]
        while len(draft) < most:
            draft += draft[: most - len(draft)]
        return draft

    def _followed(self, tokens: list[int]) -> int:
        """Where the last draft goes on, if it was right so far: that is a longer match than any n-gram's."""
        if not self.source:
            return 0
        new = len(tokens) - self._known
        place = self.source + new
        return place if tokens[self.source : place] == tokens[self._known :] else 0

    def _found(self, tokens: list[int]) -> int:
        """Where the longest n-gram that the text ends with came before; 0 if it did not."""
        for size, grams in zip(self._sizes, self._grams, strict=True):
            place = grams.get(tuple(tokens[-size:]))
            if place:
                return place
        return 0

    def _take(self, tokens: list[int]) -> None:
        for size, grams in zip(self._sizes, self._grams, strict=True):
            for place in range(max(self._known, size), len(tokens)):
                grams[tuple(tokens[place - size : place])] = place
        self._known = len(tokens)
