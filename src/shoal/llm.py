"""LLM: text in, text out. Prompts become token ids, and the engine's ids become text that ends where it should.

Everything goes through one path: ``submit`` puts a request into the engine, a step moves all of them on, and ``generate``,
``chat``, ``stream`` and ``step`` only differ in how long they wait for what.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, cast, overload

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shoal import hub
from shoal.engine.engine import Engine, Output, Request
from shoal.engine.memory_plan import max_model_len
from shoal.errors import ParameterError, RequestError, TemplateError, UnsupportedError
from shoal.gguf.reader import GGUFFile
from shoal.kernels.load import load_backend
from shoal.models.config import ModelConfig
from shoal.models.weights import load_model
from shoal.outputs import CompletionOutput, Generation, Logprob, RequestOutput
from shoal.params import EngineConfig, SamplingParams, check_seconds
from shoal.text.chat import ChatTemplate
from shoal.text.tokenizer import Tokenizer

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput"]

Prompt = str | Mapping[str, Any]  # text, {"prompt_token_ids": [...]} or {"messages": [...]}
Message = Mapping[str, Any]
Params = SamplingParams | Iterable[SamplingParams] | None
Outputs = Generator[RequestOutput, None, None]
Logits = NDArray[np.float32]

_WINDOW = 8  # times max_num_seqs: prompts of an iterator from the oldest without an answer on


class _Encoded(NamedTuple):
    """A prompt as ids, and as text where it was given as text."""

    ids: list[int]
    text: str | None


class _Limits(NamedTuple):
    """What time a request has, in seconds (see ``Request``)."""

    timeout: float | None
    queue_timeout: float | None


@dataclass(slots=True, eq=False)
class _Scoring:
    """The logits of one input, filled in step by step: [n, vocab]."""

    logits: Logits
    filled: int = 0
    error: str | None = None

    def take(self, output: Output) -> None:
        """Add the rows that a step brought."""
        self.error = output.error
        if output.logits is not None:
            rows = len(output.logits)
            self.logits[self.filled : self.filled + rows] = output.logits
            self.filled += rows


class LLM:
    """A model and everything it takes to run it. Use it from one thread at a time; it is a context manager.

        llm = LLM("smollm2:135m", max_num_seqs=32)
        for out in llm.generate(["Hello", "The capital of France is"], SamplingParams(temperature=0)):
            print(out.outputs[0].text)

    ``model`` is a path, a short name or ``hf:ORG/REPO:QUANT`` (see ``shoal.hub.resolve``). The keywords are the fields of
    EngineConfig, or ``config`` is a ready one. ``on_compile`` hears the name of each kernel that had to be compiled
    (default: they are listed on stderr).

    A prompt is a text, ``{"prompt_token_ids": [...]}``, or ``{"messages": [...]}`` with the chat template's own arguments
    under ``"chat_template_kwargs"``. In a text, the spelling of a control token is text like any other.

    A request without a seed draws one from (``EngineConfig.seed``, number of the request since the start), so the same
    calls in the same order give the same tokens.

    Raises ModelNotFoundError, GGUFError, UnsupportedError, MemoryLimitError or ParameterError where the model cannot be run.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        config: EngineConfig | None = None,
        on_compile: Callable[[str], None] | None = None,
        **flags: Any,
    ) -> None:
        self.config = _config(config, flags)
        self.path = hub.resolve(model)
        self.tokenizer: Tokenizer | None = None
        self.chat_template: ChatTemplate | None = None
        self._active: dict[str, Generation | _Scoring] = {}
        self._inbox: list[Generation] = []  # what ``submit`` started and the next ``step`` will report
        self._submitted = 0
        self._backend = load_backend(self.config.device, self.config.threads, on_compile or _say_compiled)
        try:
            with GGUFFile.open(self.path) as file:
                self._load(file)
        except BaseException:
            self._backend.close()
            raise

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop all requests, stop the threads, let go of the KV memory. Closing twice does nothing."""
        for request_id in list(self._active):
            self.abort(request_id)
        self.engine.close()
        if self.chat_template is not None:
            self.chat_template.close()
        self._backend.close()

    # -- whole answers, and answers as they grow -------------------------------------------------------------------

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        timeout: float | None = None,
        queue_timeout: float | None = None,
    ) -> list[RequestOutput]: ...

    @overload
    def generate(
        self,
        prompts: Iterator[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        timeout: float | None = None,
        queue_timeout: float | None = None,
    ) -> Outputs: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | Iterator[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        timeout: float | None = None,
        queue_timeout: float | None = None,
    ) -> list[RequestOutput] | Outputs:
        """Answer all prompts together; the outputs are in their order.

        ``sampling_params``: one for all, or one for each. ``use_tqdm`` shows a progress bar if stderr is a terminal.
        ``timeout`` and ``queue_timeout``: the seconds that each prompt has, from its start until it has ended, and until it
        begins to run; past them it ends with finish_reason "timeout" and the text so far. A prompt that cannot be served
        gives an output with ``error`` and the others complete. Raises RequestError for an empty list, ParameterError where
        the numbers of prompts and parameters differ, and for a time limit that is not a positive number.

        Prompts that are not in a sequence, but come from an iterator, are taken from it when the engine has room, and the
        outputs are yielded one by one: memory does not grow with their number. Then parameters behind those of the last
        prompt are left alone. Closing the generator aborts what is not finished, and so does an error of the iterator.
        """
        limits = _limits(timeout, queue_timeout)
        if not isinstance(prompts, (str, Mapping, Sequence)):
            return self._answers(_pairs_of(iter(prompts), sampling_params), limits, use_tqdm)
        return self._all_answers(_pairs(prompts, sampling_params), limits, use_tqdm)

    def _all_answers(
        self, pairs: list[tuple[Prompt, SamplingParams]], limits: _Limits, show: bool
    ) -> list[RequestOutput]:
        sink: list[Generation] = []
        started: list[Generation | RequestOutput] = []
        try:
            for prompt, params in pairs:
                started.append(self._start(prompt, params, limits, sink))
            with _Bar(len(started), show=show) as bar:
                waiting = sum(isinstance(item, Generation) for item in started)
                bar.update(finished=len(started) - waiting)
                while waiting:
                    self._advance()
                    finished = sum(generation.finished for generation in sink)
                    bar.update(tokens=len(sink), finished=finished)
                    waiting -= finished
                    sink.clear()
        finally:
            self._drop(started)
        return [_output(item) for item in started]

    def _answers(self, pairs: Iterator[tuple[Prompt, SamplingParams]], limits: _Limits, show: bool) -> Outputs:
        sink: list[Generation] = []
        starting = (self._start(prompt, params, limits, sink) for prompt, params in pairs)
        window: deque[Generation | RequestOutput] = deque()
        try:
            with _Bar(None, show=show) as bar:
                while _refill(window, starting, self.config.max_num_seqs):
                    if not window[0].finished:
                        self._advance()
                    bar.update(tokens=len(sink))
                    sink.clear()
                    while window and window[0].finished:
                        bar.update(finished=1)
                        yield _output(window.popleft())
        finally:
            self._drop(window)

    @overload
    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        queue_timeout: float | None = None,
    ) -> list[RequestOutput]: ...

    @overload
    def chat(
        self,
        messages: Iterator[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        queue_timeout: float | None = None,
    ) -> Outputs: ...

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]] | Iterator[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        queue_timeout: float | None = None,
    ) -> list[RequestOutput] | Outputs:
        """Answer one conversation (a list of messages) or many, as ``generate`` answers prompts.

        A message is ``{"role": ..., "content": ...}``; what the chat template takes besides goes into
        ``chat_template_kwargs``.
        """

        def prompt(conversation: Any) -> Prompt:
            return {"messages": conversation, "chat_template_kwargs": chat_template_kwargs or {}}

        limits = {"timeout": timeout, "queue_timeout": queue_timeout}
        if not isinstance(messages, Sequence):
            return self.generate(map(prompt, messages), sampling_params, use_tqdm, **limits)
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        return self.generate(
            [prompt(conversation) for conversation in conversations], sampling_params, use_tqdm, **limits
        )

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        timeout: float | None = None,
        queue_timeout: float | None = None,
    ) -> Iterator[RequestOutput]:
        """As ``generate``, but yield each output whenever it has grown, with all of its text so far.

        ``request_id`` tells them apart: they are numbered in the order of the prompts. Leaving the loop early aborts
        what is not finished.
        """
        return self._stream(_pairs(prompts, sampling_params), _limits(timeout, queue_timeout))

    def _stream(self, pairs: list[tuple[Prompt, SamplingParams]], limits: _Limits) -> Iterator[RequestOutput]:
        sink: list[Generation] = []
        started: list[Generation | RequestOutput] = []
        try:
            for prompt, params in pairs:
                started.append(self._start(prompt, params, limits, sink))
            yield from [item for item in started if isinstance(item, RequestOutput)]
            waiting = {item for item in started if isinstance(item, Generation)}
            while waiting:
                self._advance()
                # One that is aborted while another is yielded comes up twice: its end is told once.
                for generation in [item for item in _changed(sink) if item in waiting]:
                    if generation.finished:
                        waiting.remove(generation)
                    yield generation.snapshot()
        finally:
            self._drop(started)

    @overload
    def logits(self, ids: Sequence[int]) -> Logits: ...

    @overload
    def logits(self, ids: Sequence[Sequence[int]]) -> list[Logits]: ...

    def logits(self, ids: Sequence[int] | Sequence[Sequence[int]]) -> Logits | list[Logits]:
        """Logits after every token: float32 [n, vocab] for one list of ids, a list of those for a list of lists.

        Computed by the same step as generation. Raises RequestError for an input that is empty, too long, or holds an
        id that the model does not have.
        """
        many = _id_lists(ids)
        request_ids: list[str] = []
        try:
            request_ids.extend(map(self._start_scoring, many))  # one by one: an error leaves those before it here
            found = [self._active[request_id] for request_id in request_ids]
            while any(request_id in self._active for request_id in request_ids):
                self._advance()
        finally:
            for request_id in request_ids:
                self.abort(request_id)
        scored = [item for item in found if isinstance(item, _Scoring)]
        for item in scored:
            if item.error is not None:
                raise RequestError(item.error)
        return [item.logits for item in scored] if many is ids else scored[0].logits

    # -- one request at a time ---------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything left to do or to report."""
        return self.engine.has_work or bool(self._inbox)

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        timeout: float | None = None,
        queue_timeout: float | None = None,
    ) -> str:
        """Put one request in line and return its id; ``step`` reports on it. Time limits as in ``generate``.

        Raises RequestError, ParameterError or TemplateError for a request that cannot be served.
        """
        limits = _limits(timeout, queue_timeout)
        return self._submit(prompt, params or SamplingParams(), limits, self._inbox, request_id).request_id

    def step(self) -> list[RequestOutput]:
        """One step of the engine: how far each submitted request is now that got something from it, or has ended."""
        self._advance()
        changed = _changed(self._inbox)
        return [generation.snapshot() for generation in changed if generation.finish_reason != "abort"]

    def abort(self, request_id: str) -> bool:
        """End a request and free its memory. Nothing more is reported of one that was submitted; one of ``generate`` or
        ``stream`` ends with finish_reason "abort". False if there is none such."""
        item = self._active.pop(request_id, None)
        if isinstance(item, Generation) and not item.finished:
            item.finish_reason = "abort"
            if item.sink is not self._inbox:
                item.sink.append(item)
        return item is not None and self.engine.abort(request_id)

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids that a prompt stands for, as the engine gets them. Raises as ``submit``."""
        return self._encoded(prompt).ids

    # -- the one path ------------------------------------------------------------------------------------------------

    def _start(
        self, prompt: Prompt, params: SamplingParams, limits: _Limits, sink: list[Generation]
    ) -> Generation | RequestOutput:
        """Submit a request of many: its fault becomes its output."""
        request_id = str(self._submitted)
        try:
            return self._submit(prompt, params, limits, sink, request_id)
        except (RequestError, ParameterError, TemplateError) as error:
            return RequestOutput.failed(request_id, prompt if isinstance(prompt, str) else None, str(error))

    def _submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        limits: _Limits,
        sink: list[Generation],
        request_id: str | None,
    ) -> Generation:
        number, self._submitted = self._submitted, self._submitted + 1
        if request_id is None:
            request_id = str(number)
        ids, text = self._encoded(prompt)
        eos_ids = self.tokenizer.eog_ids if self.tokenizer else frozenset[int]()
        seed = _derived_seed(self.config.seed, number) if params.seed is None else params.seed
        self.engine.add(Request(request_id, tuple(ids), params, eos_ids, seed, **limits._asdict()))
        generation = Generation(request_id, text, ids, params, self.tokenizer, sink)
        self._active[request_id] = generation
        return generation

    def _start_scoring(self, ids: Sequence[int]) -> str:
        request_id = f"logits-{self._submitted}"
        self._submitted += 1
        self.engine.add(Request(request_id, tuple(_token_ids(ids)), SamplingParams(), want_logits=True))
        self._active[request_id] = _Scoring(np.empty((len(ids), self.vocab_size), np.float32))
        return request_id

    def _advance(self) -> None:
        """One step: everybody's generations take in what it brought, and go to the sinks of those who wait for them."""
        for output in self.engine.step():
            item = self._active.get(output.request_id)
            if item is None:  # aborted, or ended by a stop string
                continue
            item.take(output)
            if output.finished:
                del self._active[output.request_id]
            elif isinstance(item, Generation) and item.finished:
                self.abort(item.request_id)

    def _drop(self, started: Iterable[Generation | RequestOutput]) -> None:
        """Abort what the caller no longer waits for; after a normal end there is nothing left to abort."""
        for item in started:
            if not item.finished:
                self.abort(item.request_id)

    # -- prompts -----------------------------------------------------------------------------------------------------

    def _encoded(self, prompt: Prompt) -> _Encoded:
        if isinstance(prompt, str):
            return _Encoded(self._encode_text(prompt), prompt)
        if isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
            return _Encoded(_token_ids(prompt["prompt_token_ids"]), None)
        if isinstance(prompt, Mapping) and "messages" in prompt:
            return _Encoded(self._encode_chat(prompt["messages"], prompt.get("chat_template_kwargs") or {}), None)
        expected = 'a text, {"prompt_token_ids": [...]} or {"messages": [...]}'
        raise RequestError(f"the prompt is {type(prompt).__name__} {str(prompt)[:60]!r}, must be {expected}", "prompt")

    def _encode_text(self, text: str) -> list[int]:
        tokenizer = self._needed_tokenizer("a text prompt")
        if not text:
            raise RequestError("the prompt is empty; it needs at least 1 token", "prompt")
        self._refuse_hopeless(tokenizer, len(text))
        return tokenizer.encode(text)

    def _encode_chat(self, messages: Sequence[Message], options: Mapping[str, Any]) -> list[int]:
        tokenizer = self._needed_tokenizer("a conversation")
        if self.chat_template is None:
            raise RequestError(f"{self.path.name} has no chat template; give one with chat_template", "messages")
        self._refuse_hopeless(tokenizer, sum(_content_length(message) for message in messages))
        return self.chat_template.encode(tokenizer, messages, **options)

    def _needed_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f'{what} needs a tokenizer, which skip_tokenizer_init left out; give "prompt_token_ids"')
        return self.tokenizer

    def _refuse_hopeless(self, tokenizer: Tokenizer, num_bytes: int) -> None:
        """Refuse before it is encoded what could not fit if every token were the longest."""
        least, longest = tokenizer.min_tokens_for(num_bytes), self.engine.max_model_len
        if least > longest:
            raise RequestError(
                f"the prompt of {num_bytes} characters is at least {least} tokens; max_model_len is {longest}", "prompt"
            )

    # -- loading -----------------------------------------------------------------------------------------------------

    def _load(self, file: GGUFFile) -> None:
        if not self.config.skip_tokenizer_init:
            self.tokenizer = _tokenizer(file)
            self.chat_template = _chat_template(file, self.config.chat_template)
        longest = max_model_len(ModelConfig.from_gguf(file), self.config)
        model = load_model(file, self._backend, max_model_len=longest)
        self.vocab_size = model.config.vocab_size
        self.engine = Engine(model, self._backend, self.config)


def _config(config: EngineConfig | None, flags: dict[str, Any]) -> EngineConfig:
    known = [item.name for item in fields(EngineConfig)]
    for name, value in flags.items():
        if name not in known:
            raise ParameterError(name, value, f"left out: no such engine flag (there are {', '.join(known)})")
    if config is not None and flags:
        raise ParameterError("config", "config and flags", "given without flags")
    return config or EngineConfig(**flags)


def _tokenizer(file: GGUFFile) -> Tokenizer:
    try:
        return Tokenizer.from_gguf(file)
    except UnsupportedError as error:
        raise UnsupportedError(f"{error}; skip_tokenizer_init=True runs the model on token ids alone") from error


def _chat_template(file: GGUFFile, given: str | Path | None) -> ChatTemplate | None:
    """The template that was given (a path, or the text itself), else the file's own, else None."""
    try:
        source = given.read_text(encoding="utf-8") if isinstance(given, Path) else given
    except UnicodeDecodeError as error:
        raise ParameterError(
            "chat_template", str(given), f"a text in UTF-8; at byte {error.start} it is none"
        ) from None
    return ChatTemplate.from_gguf(file, source)


def _output(item: Generation | RequestOutput) -> RequestOutput:
    return item.snapshot() if isinstance(item, Generation) else item


def _refill(
    window: deque[Generation | RequestOutput], starting: Iterator[Generation | RequestOutput], most: int
) -> bool:
    """Start prompts until ``most`` of them run, or the window is full. False if nothing is left to wait for."""
    running = sum(not item.finished for item in window)
    while running < most and len(window) < _WINDOW * most:
        item = next(starting, None)
        if item is None:
            break
        window.append(item)
        running += not item.finished
    return bool(window)


def _pairs(prompts: Prompt | Sequence[Prompt], params: Params) -> list[tuple[Prompt, SamplingParams]]:
    """Each prompt with its parameters."""
    many = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
    if not many:
        raise RequestError("the batch is empty; it needs at least 1 prompt", "prompts")
    if params is None or isinstance(params, SamplingParams):
        each = [params or SamplingParams()] * len(many)
    else:
        each = list(params)
    if len(each) != len(many):
        raise ParameterError(
            "sampling_params", f"{len(each)} items", f"one, or as many as there are prompts ({len(many)})"
        )
    return list(zip(many, map(_checked, each), strict=True))


def _pairs_of(prompts: Iterator[Prompt], params: Params) -> Iterator[tuple[Prompt, SamplingParams]]:
    """As ``_pairs``, but each only when it is asked for."""
    if params is None or isinstance(params, SamplingParams):
        params = itertools.repeat(params or SamplingParams())
    each = iter(params)
    for number, prompt in enumerate(prompts):
        item = next(each, None)
        if item is None:
            raise ParameterError("sampling_params", f"{number} items", "one, or as many as there are prompts")
        yield prompt, _checked(item)


def _checked(params: Any) -> SamplingParams:
    if not isinstance(params, SamplingParams):
        raise ParameterError("sampling_params", params, "SamplingParams")
    return params


def _limits(timeout: float | None, queue_timeout: float | None) -> _Limits:
    check_seconds("timeout", timeout)
    check_seconds("queue_timeout", queue_timeout)
    return _Limits(timeout, queue_timeout)


def _changed(sink: list[Generation]) -> list[Generation]:
    """Empty a sink: each generation in it once."""
    changed = list(dict.fromkeys(sink))
    sink.clear()
    return changed


def _content_length(message: Any) -> int:
    content = message.get("content") if isinstance(message, Mapping) else None
    return len(content) if isinstance(content, str) else 0


def _token_ids(ids: Any) -> list[int]:
    if isinstance(ids, (str, bytes)) or not isinstance(ids, (Sequence, np.ndarray)):
        raise RequestError(f"prompt_token_ids is {type(ids).__name__}, must be a list of integers", "prompt_token_ids")
    return [int(token) if isinstance(token, np.integer) else token for token in ids]


def _id_lists(ids: Sequence[int] | Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """``ids`` itself where it is a list of lists, else a list with it alone."""
    nested = len(ids) > 0 and isinstance(ids[0], (Sequence, np.ndarray))
    return cast(Sequence[Sequence[int]], ids if nested else [ids])


def _derived_seed(seed: int, number: int) -> int:
    """A seed for request ``number`` of an engine: 64 bits that depend on both and look unrelated."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest(), "little")


class _Bar:
    """Progress on stderr, where that is a terminal: requests done, tokens a second, time left."""

    def __init__(self, total: int | None, *, show: bool) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("requests"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.0f} tokens/s"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (show and console.is_terminal),
        )
        self._task = self._progress.add_task("", total=total, rate=0.0)
        self._tokens = 0
        self._start = time.monotonic()

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def update(self, *, tokens: int = 0, finished: int = 0) -> None:
        """Count what a step brought."""
        if self._progress.disable:
            return
        self._tokens += tokens
        rate = self._tokens / max(1e-9, time.monotonic() - self._start)
        self._progress.update(self._task, advance=finished, rate=rate)


def _say_compiled(kernel: str) -> None:
    print(f"shoal: compiled {kernel} for this machine (kept for later runs)", file=sys.stderr)
