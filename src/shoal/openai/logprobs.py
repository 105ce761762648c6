"""Log-probabilities as bodies have them: OpenAI's shape for chats, OpenAI's for completions, and vLLM's for prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shoal.openai.schema import (
    ChatLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TextLogprobs,
    TokenLogprob,
    TopLogprob,
)
from shoal.params import SamplingParams

if TYPE_CHECKING:
    from shoal.llm import Logprob
    from shoal.text.tokenizer import Tokenizer

_LEAST_LOGPROB = -9999.0  # JSON has no -Infinity; OpenAI sends this

Place = dict[int, "Logprob"]  # the token there and the best ones, by id


def chat_logprobs(
    ids: Sequence[int], places: Sequence[Place], params: SamplingParams, tokenizer: Tokenizer
) -> ChatLogprobs:
    """Those of the tokens ``ids`` of an answer to a chat."""

    def entry(token: int, found: Logprob) -> TopLogprob:
        data = _bytes(token, tokenizer)
        return TopLogprob(data.decode("utf-8", "replace"), _finite(found.logprob), list(data))

    content = []
    k, asked = params.logprobs or 0, params.logprob_token_ids or ()
    for chosen, candidates in zip(ids, places, strict=True):
        ranked = sorted(candidates.items(), key=lambda item: item[1].rank)
        best = [item for place, item in enumerate(ranked) if place < k or item[0] in asked]
        own = entry(chosen, candidates[chosen])
        content.append(TokenLogprob(own.token, own.logprob, own.bytes, [entry(*item) for item in best]))
    return ChatLogprobs(content)


def prompt_places(places: Sequence[Place | None]) -> PromptLogprobs:
    """Those of the tokens of a prompt, as vLLM reports them."""
    return [
        None
        if place is None
        else {
            token: PromptLogprob(_finite(found.logprob), found.rank, found.decoded_token)
            for token, found in place.items()
        }
        for place in places
    ]


class TextScores:
    """Those of one text of /v1/completions, which may come in pieces: its tokens' places in the text are counted on."""

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer, *, skip_special: bool) -> None:
        self._params, self._tokenizer = params, tokenizer
        self._decoder = tokenizer.stream(skip_special=skip_special)
        self._offset = 0  # characters

    def prompt(self, text: str, ids: Sequence[int], places: Sequence[Place | None]) -> TextLogprobs:
        """Those of a prompt that the text begins with."""
        lengths = self._lengths(ids)
        # Its tokens may spell more than the prompt: a BOS, a space put in front. What is too much is at the start.
        self._offset = len(text) - sum(lengths)
        return self._scored(ids, places, lengths)

    def more(self, ids: Sequence[int], places: Sequence[Place | None]) -> TextLogprobs:
        """Those of the tokens that follow."""
        return self._scored(ids, places, self._lengths(ids))

    def _scored(self, ids: Sequence[int], places: Sequence[Place | None], lengths: list[int]) -> TextLogprobs:
        logprobs = TextLogprobs([], [], [], [])
        for token, place, length in zip(ids, places, lengths, strict=True):
            logprobs.tokens.append(_spelled(token, self._tokenizer))
            logprobs.token_logprobs.append(None if place is None else _finite(place[token].logprob))
            logprobs.top_logprobs.append(None if place is None else self._best(place, token))
            logprobs.text_offset.append(max(0, self._offset))
            self._offset += length
        return logprobs

    def _best(self, place: Place, token: int) -> dict[str, float]:
        """The token at a place, the ``logprobs`` likeliest there and those of ``logprob_token_ids``; ``prompt_logprobs`` may have
        asked for more."""
        k, asked = self._params.logprobs or 0, (token, *(self._params.logprob_token_ids or ()))
        shown = {other: found for other, found in place.items() if found.rank <= k or other in asked}
        return {_spelled(other, self._tokenizer): _finite(found.logprob) for other, found in shown.items()}

    def _lengths(self, ids: Sequence[int]) -> list[int]:
        """How many characters each token completes."""
        size, decoder = self._tokenizer.vocab_size, self._decoder
        return [len(decoder.push(token)) if token < size else 0 for token in ids]


def joined(first: TextLogprobs, second: TextLogprobs) -> TextLogprobs:
    """Those of a text and of what follows it."""
    return TextLogprobs(
        first.tokens + second.tokens,
        first.token_logprobs + second.token_logprobs,
        first.top_logprobs + second.top_logprobs,
        first.text_offset + second.text_offset,
    )


def _bytes(token: int, tokenizer: Tokenizer) -> bytes:
    """The bytes of a token. Models may have more rows than tokens: those have no text."""
    return tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""


def _spelled(token: int, tokenizer: Tokenizer) -> str:
    """The text of a token; one that is a piece of a character in the spelling of OpenAI: ``bytes:\\xe2\\x80``."""
    data = _bytes(token, tokenizer)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
