"""Words in sampling parameters, as tokens of one model: bad words, and the sequence breakers of DRY."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from shoal.engine.engine import TokenWords
from shoal.engine.sampling_state import bits_of, no_breakers
from shoal.errors import RequestError
from shoal.kernels.samplers import Breakers
from shoal.params import SamplingParams
from shoal.text.tokenizer import Tokenizer

_MOST_KEPT = 32  # sets of breakers
_LONGEST_TAIL = 20  # tokens of a breaker behind its first, as in llama.cpp


class WordFinder:
    """Finds them, and keeps what took long. May be used from several threads. ``vocab_size``: of the model's logits."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._breakers: dict[tuple[str, ...], Breakers] = {}

    def find(self, params: SamplingParams) -> TokenWords | None:
        """The words of a request; None where it has none. Raises RequestError where they need a tokenizer and there is none."""
        needs_breakers = params.repels and bool(params.dry_sequence_breakers)
        if not params.bad_words and not needs_breakers:
            return None
        if self._tokenizer is None:
            field = "bad_words" if params.bad_words else "dry_sequence_breakers"
            raise RequestError(f"{field}: needs a tokenizer, which skip_tokenizer_init left out", field)
        bad_words = tuple(ids for word in params.bad_words or () for ids in bad_word_ids(self._tokenizer, word))
        return TokenWords(
            bad_words, self._found_breakers(tuple(params.dry_sequence_breakers)) if needs_breakers else None
        )

    def _found_breakers(self, strings: tuple[str, ...]) -> Breakers:
        found = self._breakers.get(strings)
        if found is None:
            assert self._tokenizer is not None
            found = breakers_of(self._tokenizer, strings, self._vocab_size)
            if len(self._breakers) >= _MOST_KEPT:
                self._breakers.clear()
            self._breakers[strings] = found
        return found


def bad_word_ids(tokenizer: Tokenizer, word: str) -> list[tuple[int, ...]]:
    """A word as vLLM bans it: without a space before it, and with one where that is as many tokens and another first one."""
    bare = tuple(tokenizer.encode(word.lstrip(), add_special=False))
    spaced = tuple(tokenizer.encode(" " + word.lstrip(), add_special=False))
    if not bare:
        return [spaced]
    return [bare, spaced] if len(spaced) == len(bare) and spaced[0] != bare[0] else [bare]


def breakers_of(tokenizer: Tokenizer, strings: tuple[str, ...], vocab_size: int) -> Breakers:
    """The token sequences that spell one of ``strings``, as llama.cpp finds them: tokens that hold it, and tokens that end with
    its beginning, followed by those of its rest."""
    spelled = [tokenizer.token_bytes(token) for token in range(min(tokenizer.vocab_size, vocab_size))]
    single: set[int] = set()
    longer: set[tuple[int, ...]] = set()
    for text in strings:
        data = text.encode("utf-8", "surrogatepass")
        single.update(token for token, word in enumerate(spelled) if data in word)
        for start, rest in _split(data):
            tail = tuple(tokenizer.encode(rest, add_special=False)[:_LONGEST_TAIL])
            longer.update(
                (token, *tail) for token, word in enumerate(spelled) if word.endswith(start) and data not in word
            )
    if not single and not longer:
        return no_breakers(vocab_size)
    flat = [number for tokens in sorted(longer) for number in (len(tokens), *tokens)]
    heads = single.union(tokens[0] for tokens in longer)
    return Breakers(bits_of(single, vocab_size), bits_of(heads, vocab_size), np.array(flat, np.int32))


def _split(data: bytes) -> Iterator[tuple[bytes, str]]:
    """Each beginning of a text, and the text that follows; not inside a character."""
    for end in range(1, len(data)):
        try:
            yield data[:end], data[end:].decode()
        except UnicodeDecodeError:
            continue
