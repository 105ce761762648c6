"""What a caller gets back: RequestOutput, and how one grows token by token (text, stop strings, log-probabilities); logits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.chat.reply import Reply, ReplyFormat
from shoal.chat.thinking import ThinkingGate
from shoal.engine.engine import Metrics, Output, TokenLogprobs
from shoal.params import SamplingParams
from shoal.text.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True, slots=True)
class Logprob:
    """The natural log of a token's probability before temperature, its rank (1 is the likeliest), and its text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One answer. Its text never holds a stop string, part of one, or half a character.

    ``logprobs``: for each of ``token_ids`` the chosen token first, then the best ones; None if not asked for, as is
    ``cumulative_logprob``. ``finish_reason``: "stop", "length", "abort", "timeout" or "error"; None while it goes on.
    ``stop_reason``: the stop string, or the id of ``stop_token_ids``, that ended it. The text of an answer in a chat holds the marks
    of its reasoning and tool calls; ``reply`` takes it apart.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    reply_format: ReplyFormat | None = field(default=None, repr=False, compare=False)

    @property
    def reply(self) -> Reply:
        """The text in its channels: content, reasoning, tool calls. Outside of a chat all of it is content."""
        return Reply(self.text) if self.reply_format is None else self.reply_format.parse(self.text)

    def finished(self) -> bool:
        """Whether nothing will be added."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """What became of one request, or how far it is.

    ``prompt`` is None where the prompt was given as ids or as messages. ``prompt_logprobs``: for each of
    ``prompt_token_ids`` the token itself first, then the best ones at its place, None for the first token; None as a whole
    if not asked for or as long as the prompt is not complete. ``outputs``: one for each of the request's ``n``, in the order of their
    ``index``. ``error`` says why one of them has finish_reason "error".
    ``num_cached_tokens`` of the prompt were not computed: another prompt began with them.
    ``metrics``: times on the engine's clock in seconds; None for a request that never reached it.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: Metrics | None = None
    error: str | None = None

    @classmethod
    def failed(cls, request_id: str, prompt: str | None, error: str) -> RequestOutput:
        """The output of a request that was refused."""
        answer = CompletionOutput(index=0, text="", token_ids=[], finish_reason="error")
        return cls(request_id, prompt, [], [answer], finished=True, error=error)


class StopFinder:
    """Cuts text that arrives in pieces at the first stop string to be complete (the longest, where several are).

    What might be the beginning of a stop string is held back. The result does not depend on where the pieces end, and the
    work for a character is constant on average (Knuth, Morris and Pratt 1977, one automaton a string).
    """

    def __init__(self, stops: tuple[str, ...], *, include: bool = False) -> None:
        self.found: str | None = None
        self._stops = sorted(stops, key=len, reverse=True)
        self._fallbacks = [_fallbacks(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # how much of each stop string the text so far ends with
        self._include = include
        self._held = ""

    def push(self, piece: str) -> str:
        """Take in a piece; what may now be shown. After a stop string nothing more is."""
        if self.found is not None:
            return ""
        text = self._held + piece
        for end in range(len(self._held), len(text)):
            self.found = self._advance(text[end])
            if self.found is not None:
                self._held = ""
                return text[: end + 1 if self._include else end + 1 - len(self.found)]
        shown = len(text) - max(self._matched, default=0)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """What is still held back, once it is known that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        """Follow every stop string by one character; the longest that is now complete."""
        found = None
        for index, stop in enumerate(self._stops):
            fallbacks, matched = self._fallbacks[index], self._matched[index]
            while matched and stop[matched] != char:
                matched = fallbacks[matched - 1]
            matched += stop[matched] == char
            if matched == len(stop):
                found = found or stop
                matched = fallbacks[matched - 1]
            self._matched[index] = matched
        return found


def _fallbacks(pattern: str) -> list[int]:
    """For each prefix of ``pattern``, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(pattern)
    matched = 0
    for i in range(1, len(pattern)):
        while matched and pattern[i] != pattern[matched]:
            matched = table[matched - 1]
        matched += pattern[i] == pattern[matched]
        table[i] = matched
    return table


@dataclass(slots=True, eq=False)
class Answer:
    """One sample of a request on its way: tokens, and the text they make. Without ``tokenizer`` the text stays empty."""

    index: int
    params: SamplingParams
    tokenizer: Tokenizer | None
    reply: ReplyFormat | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    _decoder: StreamDecoder | None = field(init=False)
    _stops: StopFinder = field(init=False)
    _thinking: ThinkingGate | None = None  # while stop strings sleep

    def __post_init__(self) -> None:
        params, tokenizer, reply = self.params, self.tokenizer, self.reply
        shown = reply.marks if reply else ()
        self._decoder = tokenizer.stream(params.skip_special_tokens, shown) if tokenizer else None
        if reply and reply.reasoning and params.stop:
            self._thinking = ThinkingGate(reply.reasoning, reply.opened)
        self._stops = StopFinder(tuple(params.stop or ()), include=params.include_stop_str_in_output)

    @property
    def finished(self) -> bool:
        """Whether nothing will be added, whatever the engine still says."""
        return self.finish_reason is not None

    def take(self, output: Output) -> None:
        """Add what a step brought. Where that completes a stop string, the answer is finished and the engine not."""
        for index, token in enumerate(output.new_token_ids):
            self.token_ids.append(token)
            if output.logprobs is not None:
                self.logprobs.append(place_of(output.logprobs[index], self.tokenizer))
                self.cumulative_logprob += output.logprobs[index].logprob
            self._show(self._piece(token))
        if output.finished:
            self._finish(output)
        elif self._stops.found is not None:
            self.finish_reason, self.stop_reason = "stop", self._stops.found

    def snapshot(self) -> CompletionOutput:
        """How far it is: an output of its own, that later steps do not change."""
        with_logprobs = self.params.reports_logprobs
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=self.token_ids.copy(),
            cumulative_logprob=self.cumulative_logprob if with_logprobs else None,
            logprobs=self.logprobs.copy() if with_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            reply_format=self.reply,
        )

    def _show(self, piece: str) -> None:
        """Add text. Stop strings are looked for after the first ``min_tokens`` tokens, and when the model has thought."""
        if self._thinking is not None:
            thought, piece = self._thinking.push(piece)
            self.text += thought
            if self._thinking.open:
                self._thinking = None
        if len(self.token_ids) > self.params.min_tokens:
            piece = self._stops.push(piece)
        self.text += piece

    def _piece(self, token: int) -> str:
        """The characters that a token completes. Models may have more rows than tokens: those have no text."""
        if self._decoder is None or self.tokenizer is None or token >= self.tokenizer.vocab_size:
            return ""
        return self._decoder.push(token)

    def _finish(self, output: Output) -> None:
        if self._decoder is not None:
            self._show(self._decoder.flush())
        if self._thinking is not None:
            self.text += self._stops.push(self._thinking.flush())
        self.text += self._stops.flush()
        self.error = output.error
        if self._stops.found is not None:
            self.finish_reason, self.stop_reason = "stop", self._stops.found
        else:
            self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason


@dataclass(slots=True, eq=False)
class Generation:
    """One request on its way: takes the engine's Outputs, gives RequestOutputs.

    ``sink`` is the list of the caller that waits for it: the generation puts itself there whenever it has changed.
    ``reply``: how the text of a chat is to be read.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    tokenizer: Tokenizer | None
    sink: list[Any]
    reply: ReplyFormat | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: Metrics | None = None
    answers: list[Answer] = field(init=False)
    finished: bool = False  # nothing will be added, whatever the engine still says

    def __post_init__(self) -> None:
        self.answers = [
            Answer(
                index, self.params, self.tokenizer, self.reply and replace(self.reply, key=f"{self.reply.key}.{index}")
            )
            for index in range(self.params.n)
        ]

    @property
    def aborted(self) -> bool:
        """Whether it was ended before all of its answers had come to an end of their own."""
        return any(answer.finish_reason == "abort" for answer in self.answers)

    def take(self, output: Output) -> bool:
        """Add what a step brought; whether that was the end of an answer that the engine would go on with."""
        answer = self.answers[output.sample]
        if answer.finished:
            return False
        self.metrics = output.metrics
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = [None, *(place_of(found, self.tokenizer) for found in output.prompt_logprobs)]
        answer.take(output)
        if answer.finished:
            self.finished = all(one.finished for one in self.answers)
        self.sink.append(self)
        return answer.finished and not output.finished

    def abort(self) -> None:
        """End it where it is, unless it has ended."""
        if self.finished:
            return
        for answer in self.answers:
            answer.finish_reason = answer.finish_reason or "abort"
        self.finished = True
        self.sink.append(self)

    def snapshot(self) -> RequestOutput:
        """How far it is: an output of its own, that later steps do not change."""
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            [answer.snapshot() for answer in self.answers],
            finished=self.finished,
            prompt_logprobs=self.prompt_logprobs,
            num_cached_tokens=self.metrics.num_cached if self.metrics else 0,
            metrics=self.metrics,
            error=next((answer.error for answer in self.answers if answer.error is not None), None),
        )


def place_of(found: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """The chosen or given token first, then the best ones that are not it, then those asked for by id."""
    entry = {found.token_id: _logprob(found.token_id, found.logprob, found.rank, tokenizer)}
    for rank, (token, logprob) in enumerate(found.top, start=1):
        if token != found.token_id:
            entry[token] = _logprob(token, logprob, rank, tokenizer)
    for token, logprob, rank in found.asked:
        entry.setdefault(token, _logprob(token, logprob, rank, tokenizer))
    return entry


def _logprob(token: int, logprob: float, rank: int, tokenizer: Tokenizer | None) -> Logprob:
    if tokenizer is None or token >= tokenizer.vocab_size:
        return Logprob(logprob, rank, "")
    return Logprob(logprob, rank, tokenizer.token_bytes(token).decode("utf-8", "replace"))


@dataclass(slots=True, eq=False)
class Scoring:
    """The logits of one input, filled in step by step: [n, vocab]. ``sink`` as in ``Generation``."""

    request_id: str
    logits: NDArray[np.float32]
    sink: list[Any]
    finished: bool = False
    error: str | None = None
    _filled: int = 0

    def take(self, output: Output) -> bool:
        """Add the rows that a step brought; True never, as in ``Generation.take``: the end is the engine's."""
        self.error, self.finished = output.error, output.finished
        if output.logits is not None:
            rows = len(output.logits)
            self.logits[self._filled : self._filled + rows] = output.logits
            self._filled += rows
        self.sink.append(self)
        return False

    def abort(self) -> None:
        """End it where it is, unless it has ended."""
        if not self.finished:
            self.error, self.finished = "the request was aborted", True
            self.sink.append(self)
