"""Requests of one caller: submitted one by one, moved on by steps, told apart from those of all others of the same model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict, Unpack

from shoal.params import BeamSearchParams, PoolingParams, SamplingParams
from shoal.requests.beam import BeamSearches
from shoal.requests.dispatch import Dispatcher
from shoal.requests.embedder import Embedder
from shoal.requests.outputs import Generation, RequestOutput
from shoal.requests.pooled import EmbeddingRequestOutput, Pooled
from shoal.requests.prompts import Prompt
from shoal.requests.submission import Limits, Prepared, Submitter

Advance = Callable[[list[Generation]], list[RequestOutput]]


class Scheduling(TypedDict, total=False):
    """Who comes first (the lowest number), and the seconds until a request must have ended, and until it must have begun."""

    priority: int
    timeout: float | None
    queue_timeout: float | None


class Session:
    """What ``submit``, ``step`` and ``abort`` of an LLM do, for one caller.

    ``advance`` brings what has changed of what is in a sink; by default it computes a step. ``prefix``: what the ids of the requests
    begin with in the engine, so that callers need not agree on them; reports do not show it. Any thread may call any method.
    """

    def __init__(
        self,
        submitter: Submitter,
        embedder: Embedder,
        dispatcher: Dispatcher,
        chat_defaults: Mapping[str, Any],
        *,
        prefix: str = "",
        advance: Advance | None = None,
    ) -> None:
        self._submitter, self._embedder, self._dispatcher = submitter, embedder, dispatcher
        self._chat_defaults = chat_defaults
        self._prefix = prefix
        self._advance = advance or dispatcher.step
        self._beams = BeamSearches(submitter)
        self._inbox: list[Generation] = []  # what the next ``step`` will report
        self._embedded: list[Pooled] = []  # what the next ``embeddings`` may report

    @property
    def has_news(self) -> bool:
        """Whether ``step`` has anything to report without a step of the engine, or a search to go on with."""
        return any(not item.aborted for item in self._inbox) or bool(self._beams)

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | BeamSearchParams | None = None,
        *,
        request_id: str | None = None,
        **scheduling: Unpack[Scheduling],
    ) -> str:
        """As ``LLM.submit``."""
        if isinstance(params, BeamSearchParams):
            name = None if request_id is None else self._prefix + request_id
            return self._shown(self._beams.submit(prompt, params, _limits(scheduling), name))
        prepared = self._prepared(prompt, params, _limits(scheduling), request_id)
        self.enter(prepared)
        return self._shown(prepared.request.request_id)

    def submit_embedding(
        self,
        prompt: Prompt,
        params: PoolingParams | None = None,
        *,
        request_id: str | None = None,
        **scheduling: Unpack[Scheduling],
    ) -> str:
        """As ``LLM.submit_embedding``."""
        prepared = self.prepare_embedding(prompt, params or PoolingParams(), _limits(scheduling), request_id)
        self.enter(prepared)
        return self._shown(prepared.request.request_id)

    def prepare(
        self, prompt: Prompt, params: SamplingParams | None, limits: Limits, request_id: str | None = None
    ) -> Prepared:
        """The part of ``submit`` that takes long (encoding, compiling a constraint) and waits for no step. Raises all that ``submit``
        does for a request that cannot be served."""
        prepared = self._prepared(prompt, params, limits, request_id)
        self._submitter.engine.check(prepared.request)
        return prepared

    def _prepared(
        self, prompt: Prompt, params: SamplingParams | None, limits: Limits, request_id: str | None
    ) -> Prepared:
        if params is None:
            is_chat = isinstance(prompt, Mapping) and "messages" in prompt
            params = SamplingParams(**self._chat_defaults) if is_chat else SamplingParams()
        return self._submitter.prepare(prompt, params, limits, self._inbox, self._name(request_id))

    def prepare_embedding(
        self, prompt: Prompt, params: PoolingParams, limits: Limits, request_id: str | None = None
    ) -> Prepared:
        """The part of ``submit_embedding`` that waits for no step."""
        return self._embedder.prepare(prompt, params, limits, self._embedded, self._name(request_id))

    def enter(self, prepared: Prepared) -> None:
        """The rest of ``submit`` and ``submit_embedding``: put a request in line. Raises as ``Engine.add``."""
        self._dispatcher.start(*prepared)

    def embeddings(self) -> list[EmbeddingRequestOutput]:
        """Those of ``submit_embedding`` that have ended since the last call; not those that were aborted."""
        changed = [item for item in self._dispatcher.take(self._embedded) if item.finished]
        outputs = [item.snapshot() for item in changed if item.finish_reason != "abort"]
        for output in outputs:
            output.request_id = self._shown(output.request_id)
        return outputs

    def step(self) -> list[RequestOutput]:
        """How far each request is now that has got something since the last call, or has ended."""
        outputs = self._advance(self._inbox) + self._beams.step()
        for output in outputs:
            output.request_id = self._shown(output.request_id)
        return [output for output in outputs if all(answer.finish_reason != "abort" for answer in output.outputs)]

    def abort(self, request_id: str) -> bool:
        """End a request and free its memory; nothing more is reported of it. False if there is none such."""
        name = self._prefix + request_id
        return self._beams.abort(name) or self._dispatcher.abort(name)

    def close(self) -> None:
        """Forget the searches that were submitted."""
        self._beams.clear()

    def _name(self, request_id: str | None) -> str:
        return self._prefix + (self._submitter.next_name() if request_id is None else request_id)

    def _shown(self, name: str) -> str:
        return name.removeprefix(self._prefix)


def _limits(scheduling: Scheduling) -> Limits:
    return Limits.checked(scheduling.get("timeout"), scheduling.get("queue_timeout"), scheduling.get("priority", 0))
