"""SentencePiece's Unigram model (``tokenizer.ggml.model`` = t5): of all ways to spell a text, the likeliest."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, models

from shoal.text.charsmap import CharsMap
from shoal.text.spm import SPACE


@dataclass(frozen=True)
class Normaliser:
    """What is done to text first: the character map, then its spaces become U+2581.

    ``prefix`` puts a space in front; ``merge_spaces`` leaves one space before each word, and none at the end.
    """

    charsmap: CharsMap
    prefix: bool
    merge_spaces: bool

    def apply(self, text: str) -> str:
        """The text as tokens spell it."""
        text = self.charsmap.apply(text)
        if self.merge_spaces:
            return "".join(SPACE + word for word in text.split(" ") if word)
        return (SPACE if self.prefix and text.strip(" ") else "") + text.replace(" ", SPACE)


class Unigram:
    """Ids of text without special tokens. Safe to use from several threads.

    ``pieces`` and ``scores`` (log-probabilities) are those of all tokens; tokens of ``hidden`` no text may become.
    ``unknown`` stands for a run of characters that no token spells.
    """

    def __init__(
        self,
        pieces: Sequence[str],
        scores: Sequence[float],
        *,
        hidden: Collection[int],
        unknown: int,
        normaliser: Normaliser,
    ) -> None:
        # Normalised text holds no space, so a piece with one in it never matches.
        vocabulary = [
            (f" {token}", 0.0) if token in hidden else (piece, score)
            for token, (piece, score) in enumerate(zip(pieces, scores, strict=True))
        ]
        self._engine = Tokenizer(models.Unigram(vocabulary, unk_id=unknown, byte_fallback=False))
        self._normaliser = normaliser

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, in order."""
        normalised = self._normaliser.apply(text)
        ids: list[int] = self._engine.encode_batch_fast([normalised], add_special_tokens=False)[0].ids
        return ids
