"""/v1/responses and /v1/messages: the path of a chat, told in other words."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Iterator
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from shoal.anthropic.messages import MESSAGES, MessageEvents, counted_body, error_body, message
from shoal.anthropic.messages import chat_body as chat_of_message
from shoal.models.sampling_defaults import missing
from shoal.openai.convert import Call, answer, check_model, failure, usage
from shoal.openai.dialect import Dialect
from shoal.openai.logprobs import chat_logprobs
from shoal.openai.responses import RESPONSES, ResponseEvents, head, response
from shoal.openai.responses import chat_body as chat_of_response
from shoal.openai.schema import APIError, ChatCompletion, FinishReason, PromptTokensDetails, Usage
from shoal.openai.stream import AnswerDelta, AnswerStream, sse
from shoal.requests.outputs import RequestOutput
from shoal.server.bodies import json_object, json_response, owner_of, service_of
from shoal.server.routes.completions import log_of, whole
from shoal.server.service import Service, Tickets
from shoal.server.streams import EventStream, unless_gone
from shoal.server.worker import AnyOutput

_T = TypeVar("_T")


def routes() -> list[Route]:
    """Those of this file."""
    return [
        Route("/v1/responses", responses, methods=["POST"]),
        Route("/v1/messages", messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
    ]


async def responses(request: Request) -> ASGIApp:
    """OpenAI's Response to an input."""
    service, body = service_of(request), await json_object(request)
    call = _call(service, RESPONSES, chat_of_response(body))
    tickets, name, model = await _begun(request, call, RESPONSES)
    begun = head(body, call, response_id=name, model=model)
    if body.get("stream"):
        return EventStream(service, tickets, _ResponseWriter(service, call, ResponseEvents(begun)), log_of(request))
    (output,) = await _told(whole(request, tickets), RESPONSES)
    return json_response(response(begun, _answer(service, call, output, name)))


async def messages(request: Request) -> ASGIApp:
    """Anthropic's Message in answer to others."""
    service, body = service_of(request), await json_object(request)
    call = _call(service, MESSAGES, chat_of_message(body))
    tickets, name, model = await _begun(request, call, MESSAGES)
    if body.get("stream"):
        writer = _MessageWriter(call, MessageEvents(name, model), tickets.num_prompt)
        return EventStream(service, tickets, writer, log_of(request))
    (output,) = await _told(whole(request, tickets), MESSAGES)
    completion = _answer(service, call, output, name)
    return json_response(message(completion, message_id=name, stop_sequence=_stop_string(output)))


async def count_tokens(request: Request) -> Response:
    """How many tokens the prompt of a Message would have."""
    service, body = service_of(request), await json_object(request)
    call = _call(service, MESSAGES, counted_body(body))
    check_model(call.model, service.settings.served)
    return json_response({"input_tokens": await _told(service.count_tokens(call), MESSAGES)})


def _call(service: Service, dialect: Dialect, chat: dict[str, Any]) -> Call:
    return dialect.call(chat | missing(service.llm.chat_defaults, chat))


async def _begun(request: Request, call: Call, dialect: Dialect) -> tuple[Tickets, str, str]:
    """The request under way, its name, and that of the model in its answer."""
    service, name = service_of(request), uuid.uuid4().hex
    start = service.start([call], owner_of(request), name)
    tickets = await _told(unless_gone(request.receive, start), dialect)
    return tickets, name, call.model or service.settings.served[0]


async def _told(work: Awaitable[_T], dialect: Dialect) -> _T:
    """The result of ``work``, or its error in words of the dialect."""
    try:
        return await work
    except APIError as error:
        raise dialect.in_its_words(error) from None


def _answer(service: Service, call: Call, output: RequestOutput, name: str) -> ChatCompletion:
    model = call.model or service.settings.served[0]
    completion = answer(call, output, response_id=name, model=model, tokenizer=service.tokenizer)
    assert isinstance(completion, ChatCompletion), "these bodies become chats"
    return completion


def _stop_string(output: RequestOutput) -> str | None:
    reason = output.outputs[0].stop_reason
    return reason if isinstance(reason, str) else None


def _framed(events: list[dict[str, Any]]) -> bytes:
    return b"".join(sse(msgspec.json.encode(event), event["type"]) for event in events)


class _ResponseWriter:
    """A ``Writer`` of the events of a Response."""

    def __init__(self, service: Service, call: Call, events: ResponseEvents) -> None:
        self._service, self._call, self._events = service, call, events
        self._stream = AnswerStream(call)

    def start(self) -> bytes:
        return _framed(self._events.start())

    def push(self, output: AnyOutput, number: int) -> bytes:
        assert isinstance(output, RequestOutput)
        return _framed(list(self._grown(output)))

    def fail(self, error: APIError) -> bytes:
        return _framed(self._events.fail(RESPONSES.in_its_words(error)))

    def _grown(self, output: RequestOutput) -> Iterator[dict[str, Any]]:
        error = failure(output)
        for grown in self._stream.push(output):
            logprobs = self._logprobs(grown)
            for delta in grown.deltas:
                yield from self._events.push(delta, logprobs if delta.content else [])
                logprobs = [] if delta.content else logprobs
            if grown.finish_reason is not None and error is None:
                yield from self._events.finish(_reason(grown), usage([output]))
        if error is not None:
            yield from self._events.fail(error)

    def _logprobs(self, grown: AnswerDelta) -> list[Any]:
        if grown.logprobs is None:
            return []
        return chat_logprobs(grown.token_ids, grown.logprobs, self._call.params, self._service.tokenizer).content


class _MessageWriter:
    """A ``Writer`` of the events of a Message."""

    def __init__(self, call: Call, events: MessageEvents, num_prompt: int) -> None:
        self._events, self._num_prompt = events, num_prompt
        self._stream = AnswerStream(call)

    def start(self) -> bytes:
        return _framed(self._events.start(Usage(self._num_prompt, 0, self._num_prompt, PromptTokensDetails(0))))

    def push(self, output: AnyOutput, number: int) -> bytes:
        assert isinstance(output, RequestOutput)
        return _framed(list(self._grown(output)))

    def fail(self, error: APIError) -> bytes:
        return _framed([error_body(MESSAGES.in_its_words(error))])

    def _grown(self, output: RequestOutput) -> Iterator[dict[str, Any]]:
        error = failure(output)
        for grown in self._stream.push(output):
            for delta in grown.deltas:
                yield from self._events.push(delta)
            if grown.finish_reason is not None and error is None:
                yield from self._events.finish(_reason(grown), usage([output]), _stop_string(output))
        if error is not None:
            yield error_body(error)


def _reason(grown: AnswerDelta) -> FinishReason:
    reasons: dict[str | None, FinishReason] = {"stop": "stop", "tool_calls": "tool_calls"}
    return reasons.get(grown.finish_reason, "length")
