"""Answers as they grow: from RequestOutputs, each of which holds all of the text so far, to the chunks of OpenAI's streams.

A stream ends with ``DONE``, or, where its request fails on the way, with the error behind the text so far.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import msgspec

from shoal.chat.reply import CallDelta, Delta, ReplyFormat, ReplyStream
from shoal.openai.convert import Call, failure, opening, prompt_logprobs, prompt_text, reported_ids, text_scores, usage
from shoal.openai.fields import did_you_mean
from shoal.openai.logprobs import TextScores, chat_logprobs
from shoal.openai.schema import (
    APIError,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ErrorBody,
    FinishReason,
    FunctionDelta,
    PromptTokensDetails,
    TextChunk,
    TextChunkChoice,
    ToolCallDelta,
    Usage,
)

if TYPE_CHECKING:
    from shoal.llm import CompletionOutput, Logprob, RequestOutput
    from shoal.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"

UsageSoFar: TypeAlias = Usage | msgspec.UnsetType | None  # None: comes later; unset: not asked for
_ENDS: dict[str | None, FinishReason] = {"stop": "stop", "length": "length", "tool_calls": "tool_calls"}


# What a body says about it --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """Whether a body wants a ``stream``, and with it: ``include_usage``, the tokens of all in a last chunk;
    ``continuous_usage_stats`` (vLLM's), those so far in every chunk, if usage is included."""

    stream: bool = False
    include_usage: bool = False
    continuous_usage_stats: bool = False


_OPTIONS = ("include_usage", "continuous_usage_stats", "include_obfuscation")


def take_stream_options(body: Any) -> StreamOptions:
    """Take ``stream`` and ``stream_options`` out of a body decoded from JSON. Raises APIError that names the field at fault."""
    if not isinstance(body, dict):
        return StreamOptions()  # what parses the body says what is wrong with it
    stream, given = body.pop("stream", None), body.pop("stream_options", None)
    wanted = _flag("stream", stream)
    if given is None or given == "":
        return StreamOptions(wanted)
    if not isinstance(given, dict):
        raise APIError(f"stream_options: expected an object, got {type(given).__name__}", "stream_options")
    for name in given:
        if name not in _OPTIONS:
            place = f"stream_options.{name}"
            raise APIError(f"{place}: no such field{did_you_mean(name, _OPTIONS)}", place)
    options = {name: _flag(f"stream_options.{name}", value) for name, value in given.items() if value is not None}
    if options and not wanted:
        raise APIError("stream_options: needs stream to be true", "stream_options")
    if options.pop("include_obfuscation", False):
        place = "stream_options.include_obfuscation"
        raise APIError(f"{place}: not supported: chunks are as long as what they hold", place)
    return StreamOptions(wanted, **options)


def _flag(name: str, value: Any) -> bool:
    if value is None or value == "":
        return False
    if not isinstance(value, bool):
        raise APIError(f"{name}: expected true or false, got {value!r:.80}", name)
    return value


# What an answer has grown by ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """What answer number ``index`` has grown by since one was last made.

    ``deltas``: in its channels (outside of a chat all is content). ``token_ids`` and ``logprobs``: those of its new tokens; tokens
    without text of their own, a part of a character say, come with the next text. ``finish_reason``: in OpenAI's words, or "abort",
    "timeout" or "error"; None while the answer goes on.
    """

    index: int
    deltas: list[Delta]
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None

    @property
    def text(self) -> str:
        """The new content."""
        return "".join(delta.content for delta in self.deltas)


class AnswerStream:
    """Compares each output of one request with the one before. All deltas together are the whole answers.

    The echo that a chat asks for is the first delta of each answer; reasoning is left out if the call wants none.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._answers: dict[int, _Growing] = {}

    def push(self, output: RequestOutput) -> list[AnswerDelta]:
        """What the answers have grown by; those that have not are left out."""
        found = (self._growing(given).push(given) for given in output.outputs)
        return [delta for delta in found if delta is not None]

    def _growing(self, given: CompletionOutput) -> _Growing:
        answer = self._answers.get(given.index)
        if answer is None:
            answer = self._answers[given.index] = _Growing(self._call, given.reply_format)
        return answer


class _Growing:
    """How much of an answer has been told."""

    def __init__(self, call: Call, form: ReplyFormat | None) -> None:
        self._reply = None if form is None else ReplyStream(form)
        self._include_reasoning = call.include_reasoning
        self._echo = opening(call)[1] if call.kind == "chat" else ""
        self._characters = 0
        self._tokens = 0
        self._ended = False

    def push(self, given: CompletionOutput) -> AnswerDelta | None:
        if self._ended:
            return None
        self._ended = given.finished()
        deltas = self._deltas(given.text[self._characters :])
        self._characters = len(given.text)
        if not (deltas or self._ended):
            return None  # tokens without text wait for some
        since, self._tokens = self._tokens, len(given.token_ids)
        logprobs = None if given.logprobs is None else given.logprobs[since:]
        return AnswerDelta(given.index, deltas, given.token_ids[since:], logprobs, self._finish_reason(given))

    def _deltas(self, text: str) -> list[Delta]:
        deltas = [Delta(content=self._echo)] if self._echo else []
        self._echo = ""
        if self._reply is None:
            return [*deltas, Delta(content=text)] if text else deltas
        if text:
            deltas += self._reply.push(text)
        if self._ended:
            deltas += self._reply.flush()
        return deltas if self._include_reasoning else [delta for delta in deltas if not delta.reasoning]

    def _finish_reason(self, given: CompletionOutput) -> str | None:
        if self._reply is None or not self._ended:
            return given.finish_reason
        return self._reply.reply.finish_reason(given.finish_reason)


# Chunks ---------------------------------------------------------------------------------------------------------------

_Chunk = TypeVar("_Chunk", ChatChunk, TextChunk)


class _Chunks(ABC, Generic[_Chunk]):
    """What the streams of both endpoints have in common.

    ``finished``: the last chunk is made. ``error``: why the stream ended early; None as long as it has not.
    """

    def __init__(self, calls: Sequence[Call], model: str, tokenizer: Tokenizer, options: StreamOptions) -> None:
        self.finished = False
        self.error: APIError | None = None
        self._calls, self._model, self._tokenizer, self._options = calls, model, tokenizer, options
        self._created = int(time.time())
        self._ended: dict[int, RequestOutput] = {}

    def push(self, output: RequestOutput, number: int = 0) -> list[_Chunk | ErrorBody]:
        """The chunks for the next output of request ``number``.

        Where that has failed, the last one is the error; where it has failed before there was any text, the only one.
        """
        if self.finished:
            return []
        self.error = failure(output)
        chunks: list[_Chunk | ErrorBody] = list(self._grown(output, number))
        if output.finished:
            self._ended[number] = output
        self.finished = self.error is not None or len(self._ended) == len(self._calls)
        if self.error is not None:
            chunks.append(self.error.body())
        elif self.finished and self._options.include_usage:
            chunks.append(self._chunk([], usage(list(self._ended.values()))))
        return chunks

    def frames(self, output: RequestOutput, number: int = 0) -> bytes:
        """What ``push`` gives, as server-sent events; with ``DONE`` behind the last chunk, unless that is an error."""
        if self.finished:
            return b""
        data = b"".join(sse(msgspec.json.encode(chunk)) for chunk in self.push(output, number))
        return data + DONE if self.finished and self.error is None else data

    @abstractmethod
    def _grown(self, output: RequestOutput, number: int) -> Iterator[_Chunk]:
        """The chunks for what an output has grown by."""

    @abstractmethod
    def _chunk(self, choices: list[Any], total: UsageSoFar) -> _Chunk:
        """A chunk of this stream."""

    def _so_far(self, output: RequestOutput, tokens: int) -> UsageSoFar:
        """The usage in a chunk that is not the last one: as vLLM, that of the one answer that the chunk is about."""
        if not self._options.include_usage:
            return msgspec.UNSET
        if not self._options.continuous_usage_stats:
            return None
        prompt = len(output.prompt_token_ids)
        return Usage(prompt, tokens, prompt + tokens, PromptTokensDetails(output.num_cached_tokens))


class ChatChunks(_Chunks[ChatChunk]):
    """The chunks of a streamed chat: for each answer the role, what it grows by, and its end; then the usage, if that is asked for."""

    def __init__(
        self,
        call: Call,
        *,
        response_id: str,
        model: str,
        tokenizer: Tokenizer,
        options: StreamOptions = StreamOptions(stream=True),
    ) -> None:
        super().__init__([call], model, tokenizer, options)
        self._id = f"chatcmpl-{response_id}"
        self._call = call
        self._stream = AnswerStream(call)
        self._tokens: dict[int, int] = {}  # of each answer, so far

    def _grown(self, output: RequestOutput, number: int) -> Iterator[ChatChunk]:
        grown = self._stream.push(output)
        if self.error is not None and not self._tokens and not any(answer.deltas for answer in grown):
            return
        yield from self._roles(output)
        for answer in grown:
            self._tokens[answer.index] += len(answer.token_ids)
            for choice in self._choices(answer):
                yield self._chunk([choice], self._so_far(output, self._tokens[answer.index]))

    def _roles(self, output: RequestOutput) -> Iterator[ChatChunk]:
        """The first chunk of each answer; the very first has what is asked for about the prompt."""
        for given in output.outputs:
            if given.index in self._tokens:
                continue
            delta = ChatDelta(role=opening(self._call)[0], content="")
            chunk = self._chunk([ChatChunkChoice(given.index, delta)], self._so_far(output, 0))
            if not self._tokens:
                chunk.prompt_logprobs = prompt_logprobs(self._call, output)
                chunk.prompt_token_ids = reported_ids(self._call, output.prompt_token_ids)
            self._tokens[given.index] = 0
            yield chunk

    def _choices(self, answer: AnswerDelta) -> list[ChatChunkChoice]:
        """One for each delta, and one for the end; the first of them has what is known about the new tokens."""
        choices = [ChatChunkChoice(answer.index, _chat_delta(delta)) for delta in answer.deltas]
        if answer.finish_reason in _ENDS:
            choices.append(ChatChunkChoice(answer.index, ChatDelta(), finish_reason=_ENDS[answer.finish_reason]))
        if choices and answer.token_ids:
            choices[0].token_ids = reported_ids(self._call, answer.token_ids)
            if answer.logprobs is not None:
                choices[0].logprobs = chat_logprobs(
                    answer.token_ids, answer.logprobs, self._call.params, self._tokenizer
                )
        return choices

    def _chunk(self, choices: list[ChatChunkChoice], total: UsageSoFar) -> ChatChunk:
        return ChatChunk(self._id, self._created, self._model, choices, total)


def _chat_delta(delta: Delta) -> ChatDelta:
    if delta.call is not None:
        return ChatDelta(tool_calls=[_call_delta(delta.call)])
    if delta.reasoning:
        return ChatDelta(reasoning=delta.reasoning, reasoning_content=delta.reasoning)
    return ChatDelta(content=delta.content)


def _call_delta(call: CallDelta) -> ToolCallDelta:
    if call.id is None or call.name is None:
        return ToolCallDelta(call.index, FunctionDelta(call.arguments))
    return ToolCallDelta(call.index, FunctionDelta(call.arguments, call.name), call.id, "function")


@dataclass(slots=True)
class _Continued:
    """A prompt of a streamed completion. ``begun`` answers have had a chunk; ``tokens`` and ``scores`` are those of each so far."""

    call: Call
    number: int
    stream: AnswerStream
    begun: set[int] = field(default_factory=set)
    tokens: dict[int, int] = field(default_factory=dict)
    scores: dict[int, TextScores] = field(default_factory=dict)


class TextChunks(_Chunks[TextChunk]):
    """The chunks of a streamed completion of one prompt or of many: ``calls`` are what ``parse_completions`` makes of the body.

    An echo is the first chunk of an answer. Answer j to prompt i is choice i * n + j. The usage is that of all prompts.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        *,
        response_id: str,
        model: str,
        tokenizer: Tokenizer,
        options: StreamOptions = StreamOptions(stream=True),
    ) -> None:
        super().__init__(calls, model, tokenizer, options)
        self._id = f"cmpl-{response_id}"
        self._prompts = [_Continued(call, number, AnswerStream(call)) for number, call in enumerate(calls)]

    def _grown(self, output: RequestOutput, number: int) -> Iterator[TextChunk]:
        prompt = self._prompts[number]
        grown = prompt.stream.push(output)
        if self.error is not None and not prompt.tokens and not any(answer.deltas for answer in grown):
            return
        yield from self._echoes(prompt, output)
        for answer in grown:
            prompt.tokens[answer.index] += len(answer.token_ids)
            if answer.deltas or answer.finish_reason in _ENDS:
                yield self._of(prompt, output, self._choice(prompt, answer))

    def _echoes(self, prompt: _Continued, output: RequestOutput) -> Iterator[TextChunk]:
        """Begin the answers that are new: with the prompt, if that is to come back."""
        call = prompt.call
        for given in output.outputs:
            if given.index in prompt.tokens:
                continue
            prompt.tokens[given.index] = 0
            if given.logprobs is not None:
                prompt.scores[given.index] = text_scores(call, self._tokenizer)
            if call.echo:
                choice = TextChunkChoice(given.index, prompt_text(output, call.params, self._tokenizer))
                if given.logprobs is not None and output.prompt_logprobs is not None:
                    scores = prompt.scores[given.index]
                    choice.logprobs = scores.prompt(choice.text, output.prompt_token_ids, output.prompt_logprobs)
                yield self._of(prompt, output, choice)

    def _choice(self, prompt: _Continued, answer: AnswerDelta) -> TextChunkChoice:
        choice = TextChunkChoice(answer.index, answer.text, finish_reason=_ENDS.get(answer.finish_reason))
        if answer.token_ids:
            choice.token_ids = reported_ids(prompt.call, answer.token_ids)
            if answer.logprobs is not None:
                choice.logprobs = prompt.scores[answer.index].more(answer.token_ids, answer.logprobs)
        return choice

    def _of(self, prompt: _Continued, output: RequestOutput, choice: TextChunkChoice) -> TextChunk:
        """A choice as a chunk, numbered over all prompts; with what is asked for about its prompt, if it is its first."""
        total = self._so_far(output, prompt.tokens[choice.index])
        if choice.index not in prompt.begun:
            prompt.begun.add(choice.index)
            choice.prompt_logprobs = prompt_logprobs(prompt.call, output)
            choice.prompt_token_ids = reported_ids(prompt.call, output.prompt_token_ids)
        choice.index += prompt.number * prompt.call.params.n
        return self._chunk([choice], total)

    def _chunk(self, choices: list[TextChunkChoice], total: UsageSoFar) -> TextChunk:
        return TextChunk(self._id, self._created, self._model, choices, total)


# Frames ---------------------------------------------------------------------------------------------------------------


def sse(data: bytes, event: str | None = None) -> bytes:
    """JSON as one server-sent event, called ``event`` if that is given."""
    name = b"" if event is None else b"event: " + event.encode() + b"\n"
    return name + b"data: " + data + b"\n\n"
