"""Drafts from what was answered before: rows of one job resemble each other (vLLM's suffix, arXiv:2411.04975)."""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Iterator
from collections.abc import Sequence as Row
from itertools import islice

from shoal.engine.draft import Wanted
from shoal.engine.draft_ngram import NgramIndex

GRAM = 3  # tokens that a match has at least
_MOST_TOKENS = 1 << 18  # that are remembered of earlier answers; 12 bytes each
_MOST_PLACES = 16  # that a match is looked for at, the latest first
_END = -1  # between two answers


class SuffixDrafter:
    """What followed the longest end of a text that came before: in itself, or in answers that have ended.

    A draft is no longer than ``factor`` times its match, and ends where fewer than ``least_share`` of the places that match as long
    go on alike. Matches longer than ``depth`` count as that. Of earlier answers the last ``most_texts`` are remembered, as far as
    there is room.
    """

    def __init__(
        self, longest: int, *, depth: int = 24, factor: float = 1.0, least_share: float = 0.1, most_texts: int = 10_000
    ) -> None:
        self.longest = longest
        self._depth, self._factor, self._least_share = depth, factor, least_share
        self._earlier = Answers(most_texts)
        self._own: dict[object, NgramIndex] = {}

    def draft(self, wanted: Row[Wanted]) -> list[list[int]]:
        """A draft for each."""
        return [self._draft(one) for one in wanted]

    def ended(self, key: object, output: list[int]) -> None:
        """Remember an answer."""
        self._own.pop(key, None)
        self._earlier.add(output)

    def _draft(self, wanted: Wanted) -> list[int]:
        tokens = wanted.token_ids
        index = self._own.get(wanted.key)
        if index is None:
            index = self._own[wanted.key] = NgramIndex(range(GRAM, GRAM - 1, -1))
        own = index.draft(tokens, wanted.most)
        own_match = _alike(tokens, index.source, tokens, len(tokens), self._depth) if own else 0
        match, places = self._earlier.longest(tokens, self._depth)
        if own_match >= match:
            return own[: self._most(own_match, wanted)]
        return self._earlier.following(places, self._most(match, wanted), self._least_share)

    def _most(self, match: int, wanted: Wanted) -> int:
        return min(wanted.most, max(1, int(self._factor * match)))


class Answers:
    """The last answers, one after the other in a ring; chains lead from each place to the one before with the same last tokens
    (as in deflate), so that memory is what it is from the start."""

    def __init__(self, most_texts: int, most_tokens: int = _MOST_TOKENS) -> None:
        self._size = most_tokens
        self._starts: deque[int] = deque(maxlen=most_texts)
        self._forget()

    def _forget(self) -> None:
        self._tokens = array("i", [_END]) * self._size
        self._before = (
            array("i", [-1]) * self._size
        )  # the place before with the same hash; places count on from the start
        self._heads = array("i", [-1]) * self._size  # by hash: the last such place
        self._starts.clear()
        self._end = 0

    def add(self, answer: list[int]) -> None:
        """Remember one more."""
        if self._starts.maxlen == 0 or len(answer) <= GRAM:
            return
        if self._end > 1 << 30:  # places would outgrow their arrays: begin anew
            self._forget()
        answer = answer[-(self._size // 2) :]
        self._starts.append(self._end)
        for index, token in enumerate(answer):
            if index >= GRAM:  # the place of a token that follows enough others
                self._link(answer[index - GRAM : index])
            self._tokens[self._end % self._size] = token
            self._end += 1
        self._tokens[self._end % self._size] = _END
        self._end += 1

    def longest(self, tokens: list[int], depth: int) -> tuple[int, list[int]]:
        """How many of the last tokens came before, at most ``depth``, and the places of what followed them there."""
        best, places = 0, list[int]()
        for place in islice(self._places(tokens[-GRAM:]), _MOST_PLACES):
            match = self._match(place, tokens, depth)
            if match > best:
                best, places = match, []
            if match == best and match >= GRAM:
                places.append(place)
        return (best, places) if places else (0, [])

    def following(self, places: list[int], most: int, least_share: float) -> list[int]:
        """What most of the places go on with, as long as enough of all of them do."""
        draft: list[int] = []
        least = least_share * len(places)
        while len(draft) < most:
            nexts = [self._at(place + len(draft)) for place in places]
            token, count = Counter(nexts).most_common(1)[0]
            if token == _END or count < least:
                break
            draft.append(token)
            places = [place for place, other in zip(places, nexts, strict=True) if other == token]
        return draft

    def _link(self, gram: list[int]) -> None:
        slot = hash(tuple(gram)) % self._size
        self._before[self._end % self._size] = self._heads[slot]
        self._heads[slot] = self._end

    def _places(self, gram: list[int]) -> Iterator[int]:
        """Places behind these tokens, or others with their hash, the latest first."""
        place = self._heads[hash(tuple(gram)) % self._size]
        while place >= self._oldest:
            yield place
            place = self._before[place % self._size]

    @property
    def _oldest(self) -> int:
        """The first place that nothing was written over, with what a match may compare before it."""
        first = self._starts[0] if self._starts else self._end
        return max(first, self._end - self._size + 1, 0)

    def _match(self, place: int, tokens: list[int], depth: int) -> int:
        count, most = 0, min(depth, len(tokens), place - self._oldest)
        while count < most and self._at(place - 1 - count) == tokens[-1 - count]:
            count += 1
        return count

    def _at(self, place: int) -> int:
        return self._tokens[place % self._size] if place < self._end else _END


def _alike(one: list[int], end: int, other: list[int], other_end: int, most: int) -> int:
    """How many tokens before two ends are the same."""
    count, most = 0, min(most, end, other_end)
    while count < most and one[end - 1 - count] == other[other_end - 1 - count]:
        count += 1
    return count
