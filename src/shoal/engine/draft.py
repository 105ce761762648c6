"""Drafts: guesses of what sequences go on with. Whatever they are, they change the time that tokens take, and never a token."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Row
from typing import NamedTuple, Protocol

from shoal.engine.draft_pace import DraftPace
from shoal.engine.sequence import Sequence

_log = logging.getLogger(__name__)


class Wanted(NamedTuple):
    """At most ``most`` tokens are wanted that may follow ``token_ids``. The same ``key`` stands for the same text, grown since."""

    key: object
    token_ids: list[int]
    most: int


class Drafter(Protocol):
    """Ids in, ids out."""

    @property
    def longest(self) -> int:
        """The most tokens of a draft."""
        ...

    def draft(self, wanted: Row[Wanted]) -> list[list[int]]:
        """A draft for each, in order; it may be shorter than wanted, or empty."""
        ...

    def ended(self, key: object, output: list[int]) -> None:
        """Nothing will be wanted for a key any more; it may never have been known. ``output``: all that followed its prompt; nothing
        where others must not profit from it."""
        ...


class Speculation:
    """Has drafts made, as long as they pay. A drafter that raises is asked no more; a guess that is no token of ``vocab_size`` ends a
    draft."""

    def __init__(self, drafter: Drafter, pace: DraftPace, vocab_size: int = 2**31) -> None:
        self._drafter, self.pace, self._vocab_size = drafter, pace, vocab_size
        self._failed = False

    def draft(self, sequences: list[Sequence], room: int) -> None:
        """Give sequences that decode their drafts: at most ``room`` tokens, all together."""
        if self._failed:
            return
        most = [self._most(seq) for seq in sequences]
        counts = self.pace.counts([seq.chance for seq in sequences], most, room)
        chosen = [(seq, count) for seq, count in zip(sequences, counts, strict=True) if count]
        if chosen:
            with self.pace.drafting(sum(count for _, count in chosen)):
                drafts = self._asked([Wanted(seq, seq.token_ids, count) for seq, count in chosen])
            for (seq, count), draft in zip(chosen, drafts, strict=False):
                seq.draft = self._before_an_end(draft[:count], seq)
        for seq in sequences:
            if not seq.draft:
                seq.chance = self.pace.forgotten(seq.chance)

    def settled(self, seq: Sequence, drafted: int, kept: int) -> None:
        """Of so many drafted tokens the first ``kept`` were right."""
        seq.chance = self.pace.learned(seq.chance, drafted, kept)

    def ended(self, seq: Sequence) -> None:
        """A sequence has come to its end. Nobody may see by the time of a step what was answered under a salt of its own."""
        if self._failed:
            return
        try:
            self._drafter.ended(seq, [] if seq.request.cache_salt else seq.token_ids[seq.num_prompt :])
        except Exception:
            self._give_up()

    def _asked(self, wanted: list[Wanted]) -> list[list[int]]:
        try:
            return self._drafter.draft(wanted)
        except Exception:  # whatever a drafter does, it harms no request
            self._give_up()
            return []

    def _give_up(self) -> None:
        self._failed = True
        _log.exception("the drafter failed; nothing is guessed from now on")

    def _most(self, seq: Sequence) -> int:
        """How long a draft may be: the token behind it is the last one that there is room for. Mirostat's next token depends on how
        likely the last one was, so its rows cannot be sampled together."""
        if seq.request.params.mirostat:
            return 0
        return min(self._drafter.longest, seq.max_len - seq.num_tokens - 1)

    def _before_an_end(self, draft: list[int], seq: Sequence) -> list[int]:
        """Nothing follows a token that ends the sequence, or one that the model does not have."""
        for index, token in enumerate(draft):
            if token in seq.stop_ids or not 0 <= token < self._vocab_size:
                return draft[:index]
        return draft
