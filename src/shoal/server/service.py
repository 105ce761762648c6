"""A request from the event loop into the engine and back: admitted, encoded, awaited, given up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

from shoal.errors import ParameterError, RequestError, TemplateError
from shoal.llm import LLM
from shoal.openai.convert import Call, check_model, refusal
from shoal.openai.embeddings import EmbeddingCall, embedding_refusal
from shoal.openai.schema import APIError
from shoal.params import PoolingParams
from shoal.requests.prompts import Prompt
from shoal.requests.submission import Limits, Prepared
from shoal.server.metrics import Metrics
from shoal.server.room import WaitingRoom
from shoal.server.settings import ServerSettings
from shoal.server.store.batches import Batch
from shoal.server.worker import AnyOutput, Asked, Search, Worker
from shoal.text.tokenizer import Tokenizer

_ENCODERS = 4  # threads that encode prompts and compile constraints
_CLOSED = {"loading": "the model is being loaded", "wedged": "the engine does not move on"}
Health = Literal["ok", "loading", "draining", "wedged", "failed"]


class Ticket:
    """A request under way: keeps the newest output, which contains those before it, for one reader. ``news`` is set when there is
    something new (if ``patient``, at the end alone); many tickets may share one."""

    def __init__(self, service: Service, request_id: str, owner: str, tickets: Tickets) -> None:
        self.request_id, self.owner = request_id, owner
        self.patient = False
        self.refuse: Callable[[Any], APIError] = lambda error: APIError(str(error))
        self._service, self._news = service, tickets.news
        self.num_prompt = 0
        self._begun = self._done = False
        self._output: AnyOutput | None = None
        self._error: Exception | None = None

    # -- what the worker tells ---------------------------------------------------------------------------------------

    def put(self, output: AnyOutput) -> None:
        """How far the request is."""
        self._output = output
        self._begin()
        if output.finished:
            self._leave()
        if output.finished or not self.patient:
            self._news.set()

    def fail(self, error: Exception) -> None:
        """There will be nothing more."""
        self._error = error
        self._leave()
        self._news.set()

    # -- what a reader does ------------------------------------------------------------------------------------------

    def take(self) -> AnyOutput | None:
        """The output that is new since the last call. Raises APIError for what the engine had against the request."""
        if self._error is not None:
            raise self._error_to_tell(self._error)
        output, self._output = self._output, None
        return output

    def close(self) -> None:
        """Give the request up, unless it has ended."""
        if not self._done:
            self._service.worker.abort(self.request_id)
            self._leave()

    # -- its prompt in the waiting room --------------------------------------------------------------------------------

    def wait(self, num_prompt: int) -> None:
        """The prompt has so many tokens, and waits. Raises TooManyWaitingError."""
        self._service.room.wait(num_prompt)
        self.num_prompt = num_prompt

    def leave_unasked(self) -> None:
        """It came to nothing before the engine heard of it."""
        self._leave()

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._service.room.begin(self.num_prompt)

    def _leave(self) -> None:
        if not self._done:
            self._begin()
            self._done = True

    def _error_to_tell(self, error: Exception) -> APIError:
        if isinstance(error, (RequestError, ParameterError, TemplateError)):
            return self.refuse(error)
        return unavailable(str(error))


class Tickets:
    """What one HTTP request waits for: one ticket for each of its prompts, and a place in the waiting room for all of them, until
    it is closed. Raises TooManyWaitingError."""

    def __init__(self, room: WaitingRoom, owner: str) -> None:
        room.enter(owner)
        self._leave: Callable[[], None] | None = partial(_leave, room, owner, time.monotonic())
        self.news = asyncio.Event()
        self.all: list[Ticket] = []

    @property
    def num_prompt(self) -> int:
        """Tokens of all prompts, as far as they are known."""
        return sum(ticket.num_prompt for ticket in self.all)

    async def next(self) -> list[tuple[int, AnyOutput]]:
        """The new outputs, with the numbers of their tickets; none if it was woken for another reason. Raises as ``Ticket.take``."""
        await self.news.wait()
        self.news.clear()
        found = [(number, ticket.take()) for number, ticket in enumerate(self.all)]
        return [(number, output) for number, output in found if output is not None]

    async def finished(self) -> list[AnyOutput]:
        """The last outputs of all."""
        for ticket in self.all:
            ticket.patient = True
        ended: dict[int, AnyOutput] = {}
        while len(ended) < len(self.all):
            ended |= {number: output for number, output in await self.next() if output.finished}
        return [ended[number] for number in range(len(self.all))]

    def close(self) -> None:
        """Give up what has not ended, and the place."""
        for ticket in self.all:
            ticket.close()
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()


def _leave(room: WaitingRoom, owner: str, since: float) -> None:
    room.leave(owner, time.monotonic() - since)


class Service:
    """The server's state, and the way of requests through it. For the event loop's thread, but for what it says otherwise."""

    def __init__(self, load: Callable[[], LLM], settings: ServerSettings) -> None:
        self.settings = settings
        config = settings.engine
        tokens = settings.max_waiting_tokens
        self.room = WaitingRoom(config.max_num_seqs, settings.max_waiting, tokens)
        self.metrics = Metrics(settings.served[0], self._stats, lambda: self.room.rejected)
        self.worker = Worker(load, self.metrics)
        self.draining = False
        self.started = time.time()
        self.before_closing: Callable[[], None] = lambda: None  # done before the engine ends
        self.unfinished_batches: Callable[[], Sequence[Batch]] = tuple
        self._encoders = ThreadPoolExecutor(_ENCODERS, thread_name_prefix="shoal-encode")

    @property
    def health(self) -> Health:
        """In a word; only "ok" is well."""
        state = self.worker.state
        if state == "closed":
            return "draining"
        return "draining" if state == "ok" and self.draining else state

    @property
    def llm(self) -> LLM:
        """The model. Raises APIError (503) while there is none."""
        if self.worker.llm is None:
            failed = self.worker.error is not None
            raise unavailable("the model could not be loaded" if failed else _CLOSED["loading"])
        return self.worker.llm

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's, which a server always loads. Raises as ``llm``."""
        tokenizer = self.llm.tokenizer
        assert tokenizer is not None, "skip_tokenizer_init is no flag of the server"
        return tokenizer

    def check_open(self) -> None:
        """Raises APIError (503) unless new requests are taken."""
        if self.draining:
            raise unavailable("the server is shutting down")
        health = self.health
        if health != "ok":
            raise unavailable(_CLOSED.get(health, "the engine has ended"))

    async def start(self, calls: Sequence[Call], owner: str, request_id: str) -> Tickets:
        """Put chats or completions in line, all or none. Raises APIError: 400 for what the model cannot serve, 404, 429, 503."""
        self.check_open()
        tickets = Tickets(self.room, owner)
        try:
            for number, call in enumerate(calls):
                name = request_id if len(calls) == 1 else f"{request_id}-{number}"
                tickets.all.append(await self._start(call, Ticket(self, name, owner, tickets)))
        except BaseException:
            tickets.close()
            raise
        return tickets

    async def start_embeddings(self, call: EmbeddingCall, owner: str, request_id: str) -> Tickets:
        """Put the inputs of a body of /v1/embeddings in line. Raises as ``start``."""
        self._check_model(call.model)
        self.check_open()
        tickets, limits = Tickets(self.room, owner), self._limits(owner, 0, None)
        try:
            for number, prompt in enumerate(call.inputs):
                prepare = partial(self._prepare_embedding, prompt, call.params, limits)
                name = f"{request_id}-{number}"
                ticket = Ticket(self, name, owner, tickets)
                tickets.all.append(await self._enter(prepare, None, embedding_refusal, ticket))
        except BaseException:
            tickets.close()
            raise
        return tickets

    async def count_tokens(self, call: Call) -> int:
        """How many tokens a prompt has. Raises APIError."""
        try:
            return len(await self.in_thread(self.llm.encode, call.prompt))
        except (RequestError, ParameterError, TemplateError) as error:
            raise refusal(call, error) from None

    async def in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        """Do what takes long (encoding, files) beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._encoders, work, *args)

    def close(self) -> None:
        """End the engine; what is under way fails."""
        self.before_closing()
        self.worker.close()
        self._encoders.shutdown(wait=False, cancel_futures=True)

    async def _start(self, call: Call, ticket: Ticket) -> Ticket:
        self._check_model(call.model)
        if call.priority < 0 and self.settings.keys_given:
            raise APIError(
                f"priority: {call.priority}, must be at least 0 here, where keys share the server", "priority"
            )
        limits = self._limits(ticket.owner, call.priority, call.cache_salt)
        prepare = None if call.beams else partial(self._prepare, call, limits)
        search = (call.prompt, call.beams, limits) if call.beams else None
        return await self._enter(prepare, search, partial(refusal, call), ticket)

    def _check_model(self, model: str | None) -> None:
        """As OpenAI: a body says which model it means, though there is one alone."""
        if model is None:
            raise APIError(
                f"model: this field is required; there is {', '.join(sorted(self.settings.served))}", "model"
            )
        check_model(model, self.settings.served)

    def _prepare(self, call: Call, limits: Limits, name: str) -> Prepared:
        return self.worker.own_session.prepare(call.prompt, call.params, limits, name)

    def _prepare_embedding(self, prompt: Prompt, params: PoolingParams, limits: Limits, name: str) -> Prepared:
        return self.worker.own_session.prepare_embedding(prompt, params, limits, name)

    async def _enter(
        self,
        prepare: Callable[[str], Prepared] | None,
        search: Search | None,
        refuse: Callable[[Any], APIError],
        ticket: Ticket,
    ) -> Ticket:
        """Encode what a ticket is for, and put it in line."""
        ticket.refuse, arrived, prepared = refuse, time.monotonic(), None
        try:
            if prepare is not None:
                prepared = await self.in_thread(prepare, ticket.request_id)
                ticket.wait(len(prepared.request.prompt_token_ids))
        except (RequestError, ParameterError, TemplateError) as error:
            ticket.leave_unasked()
            raise refuse(error) from None
        except BaseException:
            ticket.leave_unasked()
            raise
        self.worker.submit(Asked(ticket.request_id, ticket.owner, arrived, ticket, prepared, search))
        return ticket

    def _limits(self, owner: str, priority: int, salt: str | None) -> Limits:
        own = owner if self.settings.isolate_prefix_cache else ""
        return Limits(
            timeout=self.settings.request_timeout,
            queue_timeout=self.settings.queue_timeout,
            priority=priority,
            cache_salt=f"{own}:{salt}" if own or salt else "",
        )

    def _stats(self) -> Any:
        llm = self.worker.llm
        return None if llm is None else llm.engine.stats()


def unavailable(why: str) -> APIError:
    """503."""
    return APIError(why, status=503, kind="server_error")
