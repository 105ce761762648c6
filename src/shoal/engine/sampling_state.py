"""What the rows of a sequence need beyond temperature, min_p, top_k and top_p: masks, banned ids and samplers, and what these remember.

The memory follows from the sequence's tokens alone, and is brought up to date when a row is sampled: preemption, and steps that were
dropped, leave no trace in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from shoal.engine.sequence import Request, TokenWords
from shoal.errors import RequestError
from shoal.kernels.base import IntArray
from shoal.kernels.samplers import (
    XTC,
    Bias,
    Breakers,
    Dry,
    MinP,
    Mirostat,
    Penalties,
    Sampler,
    Temperature,
    TopK,
    TopNSigma,
    TopP,
    Typical,
)
from shoal.params import SamplingParams

Mask = NDArray[np.uint32]

# The order where the request says nothing: vLLM's, with llama.cpp's own samplers between.
_ORDER = ("penalties", "dry", "top_n_sigma", "temperature", "typ_p", "min_p", "top_k", "top_p", "xtc")


class RowNeeds(NamedTuple):
    """What the next row of a sequence needs."""

    mask: Mask | None
    banned: IntArray | None
    samplers: tuple[Sampler, ...] | None


def check_ids(params: SamplingParams, vocab_size: int) -> None:
    """Raise RequestError for a parameter that names a token which the model does not have."""
    given = {
        "logit_bias": params.logit_bias or (),
        "allowed_token_ids": params.allowed_token_ids or (),
        "logprob_token_ids": params.logprob_token_ids or (),
    }
    for field, ids in given.items():
        if ids and max(ids) >= vocab_size:
            raise RequestError(f"{field}: token id {max(ids)}; the vocabulary ends at {vocab_size - 1}", field)


class SamplingState:
    """Of one sequence. ``draws_plainly``: its samplers leave temperature, min_p, top_k and top_p to the step that draws."""

    def __init__(self, request: Request, max_len: int, vocab_size: int) -> None:
        params, self._words = request.params, request.words or TokenWords()
        self._vocab_size, self._num_prompt = vocab_size, len(request.prompt_token_ids)
        self._mask = _mask(params.allowed_token_ids, self._words.bad_words, vocab_size)
        self._bad_endings = _endings(self._words.bad_words)
        self._counts = _counts(params, request.prompt_token_ids) if params.penalises else None
        self._history = (
            _History(params.dry_penalty_last_n, request.prompt_token_ids, max_len) if params.repels else None
        )
        self._num_seen = self._num_prompt
        self._mu, self._next_mu = 2.0 * params.mirostat_tau, (-1, 0.0)
        self._params = params
        self.draws_plainly = not params.needs_chain
        self._make = self._chain(params)

    def copy(self) -> SamplingState:
        """A state of its own that stands where this one does: for rows behind tokens that may not come to stay."""
        twin = copy(self)
        twin._counts = None if self._counts is None else self._counts.copy()
        twin._history = copy(self._history)  # what it appends lies behind all that this one looks at
        return twin

    @property
    def is_plain(self) -> bool:
        """Whether no row needs anything."""
        return self._mask is None and not self._bad_endings and not self._make

    def needs(self, token_ids: list[int]) -> RowNeeds:
        """What the row that follows ``token_ids`` needs."""
        self._take(token_ids)
        banned = self._banned(token_ids)
        samplers = tuple(make(self) for make in self._make) if self._make else None
        return RowNeeds(self._mask, banned, samplers)

    def surprised(self, num_tokens: int, surprise: float) -> None:
        """The token drawn after so many surprised by so many bits; counts once it has been committed."""
        if self._params.mirostat:
            mu = self._mu - self._params.mirostat_eta * (surprise - self._params.mirostat_tau)
            self._next_mu = (num_tokens, mu)

    def _take(self, token_ids: list[int]) -> None:
        for index in range(self._num_seen, len(token_ids)):
            if self._counts is not None:
                self._counts.take(token_ids, index)
            if self._history is not None:
                self._history.append(token_ids[index])
        self._num_seen = len(token_ids)
        if self._next_mu[0] == len(token_ids) - 1:
            self._mu, self._next_mu = self._next_mu[1], (-1, 0.0)

    def _banned(self, token_ids: list[int]) -> IntArray | None:
        """The last tokens of the bad words of which all others have just been generated."""
        if not self._bad_endings:
            return None
        output = token_ids[max(self._num_prompt, len(token_ids) - self._words.longest) :]
        endings = self._bad_endings.get(output[-1], ()) if output else ()
        found = [end for start, end in endings if tuple(output[-len(start) :]) == start]
        return np.array(found, np.int32) if found else None

    def _chain(self, params: SamplingParams) -> list[_Make]:
        names = params.samplers if params.samplers is not None else _ORDER
        if params.mirostat:
            names = ("penalties", "dry", "temperature")
        elif not params.needs_chain:
            names = ("penalties", "dry")
        if params.greedy and "temperature" in names:
            names = names[: names.index("temperature")]  # it leaves one token, to the rest as well
        makers = [] if not params.logit_bias else [_same(_bias(params.logit_bias))]
        makers += [make for name in names if (make := self._maker(name, params)) is not None]
        if params.mirostat and not params.greedy:
            makers.append(lambda state: Mirostat(params.mirostat, state._mu))
        return makers

    def _maker(self, name: str, params: SamplingParams) -> _Make | None:
        """What makes the sampler of this name anew for each row; None if it is off."""
        if name == "penalties":
            return SamplingState._penalties if self._counts is not None else None
        if name == "dry":
            return SamplingState._dry if self._history is not None else None
        sampler = _sampler(name, params)
        return None if sampler is None else _same(sampler)

    def _penalties(self) -> Sampler:
        assert self._counts is not None
        ids, counts = self._counts.arrays()
        p = self._params
        return Penalties(ids, counts, p.repetition_penalty, p.frequency_penalty, p.presence_penalty)

    def _dry(self) -> Sampler:
        assert self._history is not None
        p, breakers = self._params, self._words.breakers or no_breakers(self._vocab_size)
        return Dry(self._history.last(), p.dry_multiplier, p.dry_base, p.dry_allowed_length, breakers)


def _same(sampler: Sampler) -> _Make:
    return lambda _: sampler


def _sampler(name: str, p: SamplingParams) -> Sampler | None:
    """A sampler that is the same for each row; None if it is off."""
    spread = 0.0 if p.mirostat else p.dynatemp_range
    on: dict[str, tuple[bool, Callable[[], Sampler]]] = {
        "top_n_sigma": (p.top_n_sigma > 0, lambda: TopNSigma(p.top_n_sigma)),
        "temperature": (
            p.temperature != 1 or spread > 0,
            lambda: Temperature(p.temperature, spread, p.dynatemp_exponent),
        ),
        "typ_p": (p.typical_p < 1, lambda: Typical(p.typical_p, p.min_keep)),
        "min_p": (p.min_p > 0, lambda: MinP(p.min_p, p.min_keep)),
        "top_k": (p.top_k > 0, lambda: TopK(p.top_k)),
        "top_p": (p.top_p < 1, lambda: TopP(p.top_p, p.min_keep)),
        "xtc": (p.xtc_probability > 0, lambda: XTC(p.xtc_probability, p.xtc_threshold, p.min_keep)),
    }
    is_on, make = on[name]
    return make() if is_on else None


def _bias(given: dict[int, float]) -> Bias:
    return Bias(np.array(list(given), np.int32), np.array(list(given.values()), np.float32))


def bits_of(ids: Iterable[int], vocab_size: int) -> Mask:
    """A mask with the bits of these ids, of those below ``vocab_size``."""
    flags = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    flags[[token for token in ids if token < vocab_size]] = 1
    return np.packbits(flags, bitorder="little").view("<u4").astype(np.uint32)


def no_breakers(vocab_size: int) -> Breakers:
    """Nothing ends a repetition."""
    return Breakers(bits_of((), vocab_size), bits_of((), vocab_size), np.zeros(0, np.int32))


def _mask(allowed: Sequence[int] | None, bad_words: Sequence[Sequence[int]], vocab_size: int) -> Mask | None:
    """Allowed tokens without those that are a bad word by themselves; None if that is all of them."""
    bad = [word[0] for word in bad_words if len(word) == 1]
    if allowed is None and not bad:
        return None
    kept = bits_of(range(vocab_size) if allowed is None else allowed, vocab_size)
    return kept & ~bits_of(bad, vocab_size)


def _endings(bad_words: Sequence[Sequence[int]]) -> dict[int, list[tuple[tuple[int, ...], int]]]:
    """The longer bad words by their last token but one: what comes before the last, and the last."""
    found: dict[int, list[tuple[tuple[int, ...], int]]] = {}
    for word in bad_words:
        if len(word) > 1:
            found.setdefault(word[-2], []).append((tuple(word[:-1]), word[-1]))
    return found


def _counts(params: SamplingParams, prompt: Sequence[int]) -> _Counts:
    if params.repeat_last_n is None:
        return _Counts(prompt if params.repetition_penalty != 1 else (), weight=0)
    return _WindowCounts(prompt, params.repeat_last_n)


_Make = Callable[[SamplingState], Sampler]


class _Counts:
    """Tokens that have been seen: those of the prompt count nothing (vLLM's frequency and presence penalties), others each time."""

    def __init__(self, prompt: Sequence[int], weight: int) -> None:
        ids, counts = np.unique(np.array(prompt, np.int32), return_counts=True)
        self._size, self._place = len(ids), {token: place for place, token in enumerate(ids.tolist())}
        self._ids, self._counts = (np.zeros(2 * len(ids) + 64, np.int32) for _ in range(2))
        self._ids[: len(ids)], self._counts[: len(ids)] = ids, weight * counts

    def copy(self) -> Self:
        """Counts of its own."""
        twin = copy(self)
        twin._ids, twin._counts, twin._place = self._ids.copy(), self._counts.copy(), self._place.copy()
        return twin

    def take(self, token_ids: list[int], index: int) -> None:
        """The token at ``index`` has come."""
        self.add(token_ids[index])

    def add(self, token: int) -> None:
        place = self._place.get(token)
        if place is None:
            place = self._place[token] = self._size
            if place == len(self._ids):
                self._ids, self._counts = (np.concatenate([array, array]) for array in (self._ids, self._counts))
            self._ids[place], self._counts[place] = token, 0
            self._size += 1
        self._counts[place] += 1

    def arrays(self) -> tuple[IntArray, IntArray]:
        """Different ids, and how often each counts; valid until the next token."""
        return self._ids[: self._size], self._counts[: self._size]


class _WindowCounts(_Counts):
    """The last ``window`` tokens of prompt and output, -1 for all of them (llama.cpp's repeat_last_n)."""

    def __init__(self, prompt: Sequence[int], window: int) -> None:
        super().__init__(prompt if window < 0 else prompt[-window:], weight=1)
        self._window = window

    def take(self, token_ids: list[int], index: int) -> None:
        """The token at ``index`` has come, and one has left the window."""
        self.add(token_ids[index])
        if 0 <= self._window <= index:
            self._remove(token_ids[index - self._window])

    def _remove(self, token: int) -> None:
        place = self._place[token]
        self._counts[place] -= 1
        if self._counts[place] == 0:  # the last one takes its place: a token outside the window has no entry
            self._size -= 1
            last = int(self._ids[self._size])
            self._ids[place], self._counts[place] = last, self._counts[self._size]
            self._place[last] = place
            del self._place[token]


class _History:
    """All tokens as an array; DRY looks at the last ``window``, -1 for all of them."""

    def __init__(self, window: int, prompt: Sequence[int], max_len: int) -> None:
        self._tokens, self._size, self._window = np.empty(max_len, np.int32), len(prompt), window
        self._tokens[: len(prompt)] = prompt

    def append(self, token: int) -> None:
        self._tokens[self._size] = token
        self._size += 1

    def last(self) -> IntArray:
        """Those in the window."""
        start = 0 if self._window < 0 else max(0, self._size - self._window)
        return self._tokens[start : self._size]
