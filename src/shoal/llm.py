"""LLM: text in, text out. Prompts become token ids, and the engine's ids become text that ends where it should.

Everything goes through one path: ``submit`` puts a request into the engine, a step moves all of them on, and ``generate``,
``chat``, ``stream`` and ``step`` only differ in how long they wait for what. Prompts become ids in ``prompts``, text grows in
``outputs``, threads take turns in ``dispatch``, all of these under ``requests``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict, Unpack, cast, overload

import numpy as np
from numpy.typing import NDArray

from shoal import hub
from shoal.engine.draft import Drafter
from shoal.engine.draft_file import DraftFile, open_draft
from shoal.engine.engine import Engine, EngineStats
from shoal.engine.memory_plan import max_model_len
from shoal.engine.placement import open_backend
from shoal.errors import ParameterError, RequestError
from shoal.gguf.reader import GGUFFile
from shoal.models.config import ModelConfig
from shoal.models.sampling_defaults import sampling_defaults
from shoal.models.weights import load_model
from shoal.params import (
    BeamSearchParams,
    EngineConfig,
    PoolingParams,
    SamplingParams,
    check_priority,
)
from shoal.requests.answers import Answers, counting
from shoal.requests.beam import BeamSearches, BeamSearchOutput, NextTokens
from shoal.requests.dispatch import Dispatcher
from shoal.requests.embedder import Embedder, text_pairs
from shoal.requests.outputs import CompletionOutput, Generation, Logprob, RequestOutput, Scoring
from shoal.requests.pooled import EmbeddingRequestOutput, ScoringRequestOutput
from shoal.requests.prompts import (
    Message,
    Params,
    Priority,
    Prompt,
    PromptEncoder,
    paired,
    paired_lazily,
)
from shoal.requests.session import Advance, Session
from shoal.requests.submission import Limits, Submitter, all_asked
from shoal.system.streams import say

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput"]

Outputs = Generator[RequestOutput, None, None]
Logits = NDArray[np.float32]


class Scheduled(TypedDict, total=False):
    """Keywords of ``generate``."""

    priority: Priority
    timeout: float | None
    queue_timeout: float | None


class ChatOptions(Scheduled, total=False):
    """Keywords of ``chat``."""

    chat_template: None
    chat_template_kwargs: Mapping[str, Any] | None
    add_generation_prompt: bool | None
    continue_final_message: bool
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    reasoning_effort: str | None


class LLM:
    """A model and everything it takes to run it. A context manager.

        llm = LLM("smollm2:135m", max_num_seqs=32)
        for out in llm.generate(["Hello", "The capital of France is"], SamplingParams(temperature=0)):
            print(out.outputs[0].text)

    ``model`` is a path, a short name or ``hf:ORG/REPO:QUANT`` (see ``shoal.hub.resolve``). The keywords are the fields of
    EngineConfig, or ``config`` is a ready one. ``on_compile`` hears the name of each kernel that had to be compiled
    (default: they are listed on stderr). ``drafter`` guesses in place of the one that ``speculative_config`` names.

    A prompt is a text, ``{"prompt_token_ids": [...]}``, or ``{"messages": [...]}`` with what else ``chat`` takes (``"tools"``,
    ``"chat_template_kwargs"`` and so on). In a text, the spelling of a control token is text like any other, and BOS is added where the
    model asks for it; ``{"prompt": text, "parse_special": True, "add_special_tokens": False}`` is for one that a chat template has
    been applied to already. (In messages control tokens are never parsed, and BOS is the template's unless ``"add_special_tokens"``.)
    The first text that spells control tokens in vain, or gets two BOS, is said by ``logging``.

    A request without a seed draws one from (``EngineConfig.seed``, number of the request since the start), so the same
    calls in the same order give the same tokens.

    ``chat_defaults`` are the SamplingParams that the model's file recommends: what chats get that are given none.

    Any thread may call any method at any time, also from asyncio's executors: the requests of all threads are computed in the
    same steps, and each gets what it would get alone (those without a seed are numbered as they come). ``step`` reports what was
    submitted, by whichever thread. ``close`` ends what others wait for with finish_reason "abort". After a fork the child can go
    on with a copy of its own, unless another thread was inside just then: then the child gets an EngineError.

    Raises ModelNotFoundError, GGUFError, UnsupportedError, MemoryLimitError or ParameterError where the model cannot be run.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        config: EngineConfig | None = None,
        on_compile: Callable[[str], None] | None = None,
        drafter: Drafter | None = None,
        **flags: Any,
    ) -> None:
        config = _config(config, flags)
        self.path = hub.resolve(model)
        with GGUFFile.open(self.path) as file, open_draft(file, config) as named:
            draft = named if drafter is None else None
            self._backend, decided = open_backend(file, config, on_compile or _say_compiled, draft)
            try:
                if decided is not config:  # a GPU is there: what was made of it is news
                    say(self._backend.describe())
                self._load(file, decided, draft, drafter)
            except BaseException:
                self._backend.close()
                raise
        self.tokenizer, self.chat_template = self._prompts.tokenizer, self._prompts.chat_template
        self._dispatcher = Dispatcher(self.engine)
        self._submitter = Submitter(self._prompts, self._dispatcher, self.engine, self.vocab_size)
        self._beams = BeamSearches(self._submitter)
        self._embedder = Embedder(self._prompts, self._dispatcher, self.engine, self._model_config)
        self._answers = Answers(self._submitter, self._dispatcher, self.engine)
        self._own = self.session()

    def _load(self, file: GGUFFile, config: EngineConfig, draft: DraftFile | None, drafter: Drafter | None) -> None:
        model_config = ModelConfig.from_gguf(file)
        longest = max_model_len(model_config, config)
        # What an encoder takes follows from the size of a step, which may change.
        most = model_config.context_length if model_config.arch.encoder else longest
        self._prompts = PromptEncoder.from_gguf(file, config, most)
        self.chat_defaults = sampling_defaults(file)
        loaded = load_model(file, self._backend, max_model_len=longest)
        self._model_config, self.vocab_size = loaded.config, loaded.config.vocab_size
        draft_model = None if draft is None else draft.load(self._backend, longest)
        self.engine = Engine(loaded, self._backend, config, draft=draft_model, drafter=drafter)

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def config(self) -> EngineConfig:
        """How the engine is sized now."""
        return self.engine.config

    def stats(self) -> EngineStats:
        """Where the engine stands now."""
        return self.engine.stats()

    def resize(
        self,
        *,
        max_num_seqs: int | None = None,
        kv_cache_memory: int | str | None = None,
        max_num_batched_tokens: int | None = None,
    ) -> None:
        """Change the sizes of the engine, those that are given, while the model stays loaded and requests are under way.

        KV memory is given back before the new is taken. Requests that run are preempted and go on with the same result; one
        that can no longer fit at all ends with an ``error``. Raises ParameterError for a wrong size, MemoryLimitError with both
        numbers for more memory than there is: then nothing has changed.
        """
        sizes = {
            "max_num_seqs": max_num_seqs,
            "kv_cache_memory": kv_cache_memory,
            "max_num_batched_tokens": max_num_batched_tokens,
        }
        self._dispatcher.resize({name: size for name, size in sizes.items() if size is not None})

    def close(self) -> None:
        """Drop all requests, stop the threads, let go of the KV memory. Closing twice does nothing."""
        self._own.close()
        self._dispatcher.close()
        self._prompts.close()
        self._submitter.close()
        self._backend.close()

    # -- whole answers, and answers as they grow -------------------------------------------------------------------

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        **scheduling: Unpack[Scheduled],
    ) -> list[RequestOutput]: ...

    @overload
    def generate(
        self,
        prompts: Iterator[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        **scheduling: Unpack[Scheduled],
    ) -> Outputs: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | Iterator[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        priority: Priority = 0,
        timeout: float | None = None,
        queue_timeout: float | None = None,
    ) -> list[RequestOutput] | Outputs:
        """Answer all prompts together; the outputs are in their order.

        ``sampling_params``: one for all, or one for each. ``use_tqdm`` shows a progress bar if stderr is a terminal.
        ``timeout`` and ``queue_timeout``: the seconds that each prompt has, from its start until it has ended, and until it
        begins to run; past them it ends with finish_reason "timeout" and the text so far. ``priority``: one for all, or one for
        each; those of the lowest number are admitted first. A prompt that cannot be served
        gives an output with ``error`` and the others complete. Raises RequestError for an empty list, ParameterError where
        the numbers of prompts and parameters or priorities differ, and for a time limit that is not a positive number.

        Prompts that are not in a sequence, but come from an iterator, are taken from it when the engine has room, and the
        outputs are yielded one by one: memory does not grow with their number. Then parameters behind those of the last
        prompt are left alone, and one priority is for all. Closing the generator aborts what is not finished, and so does an error of
        the iterator.
        """
        limits = Limits.checked(timeout, queue_timeout)
        self.refuse_encoder("generate")
        if not isinstance(prompts, (str, Mapping, Sequence)):
            limits = limits._replace(priority=check_priority(priority))
            requests = ((*pair, limits) for pair in paired_lazily(iter(prompts), sampling_params))
            return self._answers.as_they_come(requests, use_tqdm)
        return self._answers.together(all_asked(prompts, sampling_params, priority, limits), use_tqdm)

    @overload
    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        **options: Unpack[ChatOptions],
    ) -> list[RequestOutput]: ...

    @overload
    def chat(
        self,
        messages: Iterator[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        **options: Unpack[ChatOptions],
    ) -> Outputs: ...

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]] | Iterator[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        chat_template: None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        reasoning_effort: str | None = None,
        priority: Priority = 0,
        timeout: float | None = None,
        queue_timeout: float | None = None,
    ) -> list[RequestOutput] | Outputs:
        """Answer one conversation (a list of messages) or many, as ``generate`` answers prompts.

        A message is ``{"role": ..., "content": ...}``, also with ``tool_calls`` and of role "tool", as OpenAI has them; what the
        chat template takes besides goes into ``chat_template_kwargs``. A template that asks for the date is told that of this
        call, for all conversations; ``strftime_now`` there is a datetime to tell it instead.

        ``tools``, ``tool_choice``, ``parallel_tool_calls`` and ``reasoning_effort`` are OpenAI's. The calls and the reasoning are
        found in ``outputs[0].reply``; ``outputs[0].text`` is all that the model wrote. ``continue_final_message`` goes on with the
        last message; otherwise a new one is begun, unless ``add_generation_prompt`` is False. ``chat_template`` is given to LLM,
        not here. Without ``sampling_params`` those hold that the model's file recommends (``chat_defaults``).
        """
        if chat_template is not None:
            raise ParameterError("chat_template", chat_template, "given to LLM, not with a request")
        template_kwargs = chat_template_kwargs
        if template_kwargs is None or isinstance(template_kwargs, Mapping):
            template_kwargs = {"strftime_now": datetime.now(), **(template_kwargs or {})}
        options = {
            "chat_template_kwargs": template_kwargs,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            "tool_choice": tool_choice,
            "parallel_tool_calls": parallel_tool_calls,
            "reasoning_effort": reasoning_effort,
        }
        if sampling_params is None:
            sampling_params = SamplingParams(**self.chat_defaults)

        def prompt(conversation: Any) -> Prompt:
            return {"messages": conversation, **options}

        scheduling: dict[str, Any] = {"priority": priority, "timeout": timeout, "queue_timeout": queue_timeout}
        if not isinstance(messages, Sequence):
            return self.generate(map(prompt, messages), sampling_params, use_tqdm, **scheduling)
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        return self.generate(
            [prompt(conversation) for conversation in conversations], sampling_params, use_tqdm, **scheduling
        )

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        priority: Priority = 0,
        timeout: float | None = None,
        queue_timeout: float | None = None,
    ) -> Iterator[RequestOutput]:
        """As ``generate``, but yield each output whenever it has grown, with all of its text so far.

        ``request_id`` tells them apart: they are numbered in the order of the prompts. Leaving the loop early aborts
        what is not finished.
        """
        self.refuse_encoder("stream")
        return self._answers.growing(
            all_asked(prompts, sampling_params, priority, Limits.checked(timeout, queue_timeout))
        )

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, timeout: float | None = None
    ) -> list[BeamSearchOutput]:
        """The likeliest texts for each prompt; the outputs are in their order.

        What beams have in common is computed once, as long as ``enable_prefix_caching`` is on. A prompt that cannot be served
        gives an output with ``error``. ``timeout``: seconds for each token. Raises RequestError for an empty list.
        """
        return self._beams.together([prompt for prompt, _ in paired(prompts, None)], params, self._next_tokens(timeout))

    def _next_tokens(self, timeout: float | None) -> NextTokens:
        def ask(beams: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
            ids = [{"prompt_token_ids": tokens} for tokens in beams]
            return self.generate(ids, params, use_tqdm=False, timeout=timeout)

        return ask

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
        sink: list[Scoring] = []
        scored: list[Scoring] = []
        try:
            scored.extend(self._submitter.score(item, sink) for item in many)  # an error leaves those before it here
            while not all(item.finished for item in scored):
                self._dispatcher.next_changed(sink)
        finally:
            self._dispatcher.drop(scored)
        for item in scored:
            if item.error is not None:
                raise RequestError(item.error)
        return [item.logits for item in scored] if many is ids else scored[0].logits

    # -- embeddings and scores ---------------------------------------------------------------------------------------

    def embed(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | None = None,
        priority: int = 0,
        timeout: float | None = None,
        queue_timeout: float | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Embeddings of texts (or ids), computed together; the outputs are in their order.

        Of an embedding model, or of any other: then of its last token's state. How states are pooled is the file's choice, or that of
        ``EngineConfig.pooling_type``. An input that is too long gives an output with ``error``, unless ``truncate_prompt_tokens`` (also
        in ``pooling_params``) says how much of it to take. Time limits and progress bar as in ``generate``. Raises RequestError for no
        input and for a model that ranks, ParameterError for more ``dimensions`` than there are.
        """
        inputs = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        params = _pooling_params(pooling_params, truncate_prompt_tokens)
        limits = Limits.checked(timeout, queue_timeout, priority)
        with counting(len(inputs), use_tqdm) as count:
            return self._embedder.embed(inputs, params, limits, count)

    def refuse_encoder(self, what: str) -> None:
        """Raise RequestError that says why ``what`` (a method, a verb) cannot be done, if the model is an encoder."""
        self._embedder.refuse_encoder(what)

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
        pooling_params: PoolingParams | None = None,
        priority: int = 0,
        timeout: float | None = None,
        queue_timeout: float | None = None,
    ) -> list[ScoringRequestOutput]:
        """How well each document of ``data_2`` answers its query in ``data_1``: one query for all, or one for each.

        A model that ranks (pooling "rank") reads query and document together; its score goes through a sigmoid unless
        ``PoolingParams(use_activation=False)``. Of other models it is the cosine of the two embeddings. Otherwise as ``embed``.
        """
        params = _pooling_params(pooling_params, truncate_prompt_tokens)
        limits, pairs = Limits.checked(timeout, queue_timeout, priority), text_pairs(data_1, data_2)
        with counting(len(pairs), use_tqdm) as count:
            return self._embedder.score(pairs, params, limits, count)

    # -- one request at a time ---------------------------------------------------------------------------------------

    def session(self, *, prefix: str = "", advance: Advance | None = None) -> Session:
        """Another caller with requests of its own, as ``submit``, ``step`` and ``abort`` are one. ``prefix`` tells their ids apart;
        ``advance``: see ``Session``."""
        return Session(
            self._submitter, self._embedder, self._dispatcher, self.chat_defaults, prefix=prefix, advance=advance
        )

    def taken(self, sink: list[Generation]) -> list[RequestOutput]:
        """How far everything is that steps of others have left in ``sink``: an ``advance`` for who computes no steps himself."""
        return [item.snapshot() for item in self._dispatcher.take(sink)]

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything left to do or to report."""
        return self._dispatcher.has_work or self._own.has_news

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | BeamSearchParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        queue_timeout: float | None = None,
    ) -> str:
        """Put one request in line and return its id; ``step`` reports on it. Priority and time limits as in ``generate``.

        Of a beam search (BeamSearchParams) ``step`` reports the end alone: an answer for each text, the best first. Its time limits
        are those of each token.

        Raises RequestError, ParameterError or TemplateError for a request that cannot be served.
        """
        return self._own.submit(
            prompt, params, request_id=request_id, priority=priority, timeout=timeout, queue_timeout=queue_timeout
        )

    def submit_embedding(
        self,
        prompt: Prompt,
        params: PoolingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        queue_timeout: float | None = None,
    ) -> str:
        """As ``submit``, for one embedding: ``step`` moves it on, ``embeddings`` has it when it is done."""
        return self._own.submit_embedding(
            prompt, params, request_id=request_id, priority=priority, timeout=timeout, queue_timeout=queue_timeout
        )

    def embeddings(self) -> list[EmbeddingRequestOutput]:
        """Those of ``submit_embedding`` that have ended since the last call; not those that were aborted."""
        return self._own.embeddings()

    def step(self) -> list[RequestOutput]:
        """One step of the engine: how far each submitted request is now that got something from it, or has ended."""
        return self._own.step()

    def abort(self, request_id: str) -> bool:
        """End a request and free its memory. Nothing more is reported of one that was submitted; one of ``generate`` or
        ``stream`` ends with finish_reason "abort". False if there is none such."""
        return self._own.abort(request_id)

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids that a prompt stands for, as the engine gets them. Raises as ``submit``."""
        return self._prompts.encode(prompt).ids


def _config(config: EngineConfig | None, flags: dict[str, Any]) -> EngineConfig:
    known = [item.name for item in fields(EngineConfig)]
    for name, value in flags.items():
        if name not in known:
            raise ParameterError(name, value, f"left out: no such engine flag (there are {', '.join(known)})")
    if config is not None and flags:
        raise ParameterError("config", "config and flags", "given without flags")
    return config or EngineConfig(**flags)


def _pooling_params(params: PoolingParams | None, truncate_prompt_tokens: int | None) -> PoolingParams:
    params = params or PoolingParams()
    if truncate_prompt_tokens is None:
        return params
    return replace(params, truncate_prompt_tokens=truncate_prompt_tokens)


def _id_lists(ids: Sequence[int] | Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """``ids`` itself where it is a list of lists, else a list with it alone."""
    nested = len(ids) > 0 and isinstance(ids[0], (Sequence, np.ndarray))
    return cast(Sequence[Sequence[int]], ids if nested else [ids])


def _say_compiled(kernel: str) -> None:
    say(f"compiled {kernel} for this machine")
