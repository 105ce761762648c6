"""The thread that owns the engine: it loads the model, computes every step, and tells whoever waits what became of his request."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

from shoal.engine.engine import EngineStats, Slot
from shoal.errors import EngineError, ParameterError, RequestError, TemplateError
from shoal.llm import LLM
from shoal.params import BeamSearchParams
from shoal.requests.outputs import RequestOutput
from shoal.requests.pooled import EmbeddingRequestOutput
from shoal.requests.prompts import Prompt
from shoal.requests.session import Session
from shoal.requests.submission import Limits, Prepared
from shoal.server.turns import Turns

State = Literal["loading", "ok", "wedged", "failed", "closed"]
AnyOutput = RequestOutput | EmbeddingRequestOutput
Search = tuple[Prompt, BeamSearchParams, Limits]
_T = TypeVar("_T")

_IDLE_BEAT = 1.0  # seconds between two beats of a loop that has nothing to do
_WEDGED_AFTER = 30.0  # seconds without a step, or this many times the slowest step so far:
_TIMES_SLOWEST = 10
_SLOTS_EVERY = 0.2  # seconds
_MOST_SLOTS_WAITING = 64
_ASSUMED_OUTPUT = 512  # tokens of an answer without a limit, for its turn

_log = logging.getLogger(__name__)


class Listener(Protocol):
    """Who waits for a request. Both are called in the event loop."""

    def put(self, output: AnyOutput) -> None:
        """How far the request is; the last one is finished."""

    def fail(self, error: Exception) -> None:
        """There will be no output."""


class Observer(Protocol):
    """Who counts. Called by the engine's thread."""

    def stepped(self, stats: EngineStats, seconds: float) -> None:
        """After each step."""

    def progressed(self, tracked: Tracked, output: RequestOutput, now: float) -> None:
        """A request has got something, or ended."""

    def aborted(self, tracked: Tracked) -> None:
        """A request was given up by its client."""


@dataclass(slots=True)
class Tracked:
    """A request under way. ``arrived``: on the monotonic clock, when the server had read it."""

    owner: str
    arrived: float
    listener: Listener
    turn: int
    cost: int
    num_prompt: int
    begun: bool = False
    num_output: int = 0
    last_token: float = 0.0


@dataclass(frozen=True, slots=True)
class Asked:
    """A request on its way to the engine: prepared, or a beam search, which only the engine's thread may begin."""

    request_id: str
    owner: str
    arrived: float
    listener: Listener
    prepared: Prepared | None = None
    search: Search | None = None


class Worker:
    """``load`` gives the LLM, in the thread, which then calls ``on_loaded``; ``on_failure`` hears why there is none, or none any more.
    ``start`` begins, ``close`` ends it; ``submit``, ``abort`` and ``session`` may be called
    by any thread.

    The loop beats at every pass. It is wedged when it has work and has not beaten for 30 s, or ten times the slowest step so far.
    """

    def __init__(
        self, load: Callable[[], LLM], observer: Observer, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._load, self._observer, self._clock = load, observer, clock
        self._thread = threading.Thread(target=self._run, name="shoal-engine", daemon=True)
        self._commands: deque[Asked | str] = deque()  # what is to begin, and the ids of what is given up
        self._wake = threading.Event()
        self._stepped, self._steps = threading.Condition(), 0
        self._tracked: dict[str, Tracked] = {}
        self._turns = Turns()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = False
        self._beat = clock()
        self._busy = False
        self._slowest = 0.0
        self._dumped = False
        self._slots_taken = 0.0
        self.slots: list[Slot] = []
        self.owners: dict[str, str] = {}  # of those in ``slots``
        self.error: BaseException | None = None
        self.ready = threading.Event()  # loaded, or failed to
        self.on_loaded: Callable[[LLM], None] = lambda llm: None
        self.on_failure: Callable[[BaseException], None] = lambda error: None
        self._ended = threading.Event()
        self.llm: LLM | None = None
        self._own: Session | None = None

    # -- from any thread ---------------------------------------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Load the model and begin; listeners are called in ``loop``."""
        self._loop = loop
        self._thread.start()

    @property
    def state(self) -> State:
        """Where it stands; "failed" means that it will never do anything again."""
        if self.error is not None:
            return "failed"
        if not self.ready.is_set():
            return "loading"
        if not self._thread.is_alive():
            return "closed"
        return "wedged" if self._is_wedged() else "ok"

    @property
    def broken(self) -> str | None:
        """What the engine raised when it last could compute nothing at all."""
        return None if self.llm is None else self.llm.engine.stats().broken

    @property
    def seconds_since_beat(self) -> float:
        """How long the loop has not come round."""
        return self._clock() - self._beat

    @property
    def own_session(self) -> Session:
        """For preparing requests, in any thread."""
        assert self._own is not None, "the model is loaded"
        return self._own

    def submit(self, asked: Asked) -> None:
        """Put a request in line; it is in the next step if there is room."""
        self._command(asked)

    def abort(self, request_id: str) -> None:
        """Give a request up, before the next step; its listener hears nothing more."""
        self._command(request_id)

    def session(self, prefix: str) -> GuestSession:
        """For a thread with requests of its own, which computes no steps."""
        assert self.llm is not None, "the model is loaded"
        return GuestSession(self, self.llm, prefix)

    def wake(self) -> None:
        """Let the loop look for work."""
        self._wake.set()

    @property
    def steps(self) -> int:
        """How many have been told of."""
        return self._steps

    def wait_for_step(self, since: int, seconds: float) -> None:
        """Return when there were more than ``since`` steps, or when the time is up."""
        with self._stepped:
            self._stepped.wait_for(lambda: self._steps > since, seconds)

    def close(self, seconds: float = 30.0) -> None:
        """End the loop after the step that it computes; what is under way is aborted."""
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(seconds)

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            llm = self._load()
        except BaseException as error:
            self._end(error)
            return
        try:
            with llm:
                self.llm, self._own = llm, llm.session(prefix="http:")
                self._beat = self._clock()
                self.on_loaded(llm)
                self.ready.set()
                while not self._closing:
                    self._pass(llm)
        except BaseException as error:
            _log.critical("the engine's thread has ended", exc_info=error)
            self._end(error)
        finally:
            self._ended.set()
            self._fail_all()

    def _end(self, error: BaseException) -> None:
        self.error = error
        self.ready.set()
        self.on_failure(error)

    def _pass(self, llm: LLM) -> None:
        self._wake.clear()
        while self._commands:
            command = self._commands.popleft()
            if isinstance(command, Asked):
                self._enter(command)
            else:
                self._abort(command)
        self._busy = llm.has_work
        self._beat = self._clock()
        if self._busy:
            self._step(llm)
        else:
            self._take_slots(llm)
            self._wake.wait(_IDLE_BEAT)

    def _step(self, llm: LLM) -> None:
        started = self._clock()
        outputs: list[AnyOutput] = [*self.own_session.step(), *self.own_session.embeddings()]
        now, stats = self._clock(), llm.engine.stats()
        self._slowest = max(self._slowest, now - started)
        with self._stepped:
            self._steps += 1
            self._stepped.notify_all()
        told = [(self._tracked[output.request_id], output) for output in outputs if output.request_id in self._tracked]
        for tracked, output in told:
            self._note(tracked, output, now)
        self._tell([(tracked.listener, output) for tracked, output in told])
        self._observer.stepped(stats, now - started)
        if now - self._slots_taken >= _SLOTS_EVERY:
            self._take_slots(llm)

    def _note(self, tracked: Tracked, output: AnyOutput, now: float) -> None:
        if not tracked.begun:
            tracked.begun = True
            self._turns.begun(tracked.turn)
        if isinstance(output, RequestOutput):
            self._observer.progressed(tracked, output, now)
        if output.finished:
            del self._tracked[output.request_id]
            self._turns.give_back(tracked.owner, tracked.cost - tracked.num_prompt - tracked.num_output)

    def _enter(self, asked: Asked) -> None:
        if asked.request_id in self._tracked:
            self._fail(asked.listener, RequestError(f"request_id {asked.request_id!r} is in use", "request_id"))
            return
        try:
            tracked = self._begin_search(asked) if asked.prepared is None else self._begin(asked, asked.prepared)
        except (RequestError, ParameterError, TemplateError, EngineError) as error:
            self._fail(asked.listener, error)
        else:
            self._tracked[asked.request_id] = tracked

    def _begin(self, asked: Asked, prepared: Prepared) -> Tracked:
        request = prepared.request
        num_prompt = len(request.prompt_token_ids)
        output = 0 if request.pooling else request.params.n * (request.params.max_tokens or _ASSUMED_OUTPUT)
        turn = self._turns.take(asked.owner, num_prompt + output)
        self.own_session.enter(prepared._replace(request=replace(request, turn=turn)))
        return Tracked(asked.owner, asked.arrived, asked.listener, turn, num_prompt + output, num_prompt)

    def _begin_search(self, asked: Asked) -> Tracked:
        assert asked.search is not None
        prompt, params, limits = asked.search
        self.own_session.submit(
            prompt,
            params,
            request_id=asked.request_id,
            priority=limits.priority,
            timeout=limits.timeout,
            queue_timeout=limits.queue_timeout,
        )
        return Tracked(asked.owner, asked.arrived, asked.listener, 0, 0, 0)

    def _abort(self, request_id: str) -> None:
        tracked = self._tracked.pop(request_id, None)
        if tracked is None:
            return
        self.own_session.abort(request_id)
        self._turns.give_back(tracked.owner, tracked.cost - tracked.num_prompt - tracked.num_output)
        self._observer.aborted(tracked)

    def _take_slots(self, llm: LLM) -> None:
        self._slots_taken = self._clock()
        self.slots = llm.engine.slots(_MOST_SLOTS_WAITING)
        self.owners = {name: tracked.owner for name, tracked in self._tracked.items()}

    # -- what is told ------------------------------------------------------------------------------------------------

    def _command(self, command: Asked | str) -> None:
        self._commands.append(command)
        self._wake.set()
        if self._ended.is_set():
            self._fail_all()

    def _tell(self, told: list[tuple[Listener, AnyOutput]]) -> None:
        if told and self._loop is not None:
            self._in_loop(lambda: _put_all(told))

    def _fail(self, listener: Listener, error: Exception) -> None:
        self._in_loop(lambda: listener.fail(error))

    def _fail_all(self) -> None:
        error = EngineError(
            "the server is shutting down" if self.error is None else f"the engine has ended: {self.error}"
        )
        for tracked in list(self._tracked.values()):
            self._fail(tracked.listener, error)
        self._tracked.clear()
        while self._commands:
            command = self._commands.popleft()
            if isinstance(command, Asked):
                self._fail(command.listener, error)

    def _in_loop(self, call: Callable[[], Any]) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call)

    def _is_wedged(self) -> bool:
        """Says once, in the log, where all threads are."""
        limit = max(_WEDGED_AFTER, _TIMES_SLOWEST * self._slowest)
        wedged = self._busy and self.seconds_since_beat > limit
        if wedged and not self._dumped:
            _log.critical("no step for %.0f s; where the threads are:", self.seconds_since_beat)
            faulthandler.dump_traceback(sys.__stderr__ or 2)
        self._dumped = wedged
        return wedged


def _put_all(told: list[tuple[Listener, AnyOutput]]) -> None:
    for listener, output in told:
        listener.put(output)


class GuestSession:
    """A session of a thread that computes no steps: ``step`` waits for those of the worker. Methods as those of ``LLM``."""

    def __init__(self, worker: Worker, llm: LLM, prefix: str) -> None:
        self._worker, self._llm = worker, llm
        self._session = llm.session(prefix=prefix, advance=self._wait)

    def submit(self, *args: Any, **kwargs: Any) -> str:
        """Put a request in line."""
        return self._woken(self._session.submit(*args, **kwargs))

    def submit_embedding(self, *args: Any, **kwargs: Any) -> str:
        """Put an embedding in line."""
        return self._woken(self._session.submit_embedding(*args, **kwargs))

    def embeddings(self) -> list[EmbeddingRequestOutput]:
        """Those that have ended since the last call."""
        return self._session.embeddings()

    def step(self) -> list[RequestOutput]:
        """How far each request is now that has got something since the last call; waits a second for that."""
        return self._woken(self._session.step())  # a beam search may have put more in line

    def abort(self, request_id: str) -> bool:
        """End a request."""
        return self._woken(self._session.abort(request_id))

    def _woken(self, result: _T) -> _T:
        self._worker.wake()
        return result

    def _wait(self, sink: list[Any]) -> list[RequestOutput]:
        steps = self._worker.steps
        outputs = self._llm.taken(sink)
        if not outputs:
            self._worker.wait_for_step(steps, _IDLE_BEAT)
            outputs = self._llm.taken(sink)
        return outputs
