"""/v1/chat/completions, /v1/completions and /v1/embeddings."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from shoal.models.sampling_defaults import missing
from shoal.openai.convert import Call, answer, completions_answer, failure, parse_chat, parse_completions
from shoal.openai.embeddings import embedding_answer, parse_embedding
from shoal.openai.schema import APIError
from shoal.openai.stream import ChatChunks, StreamOptions, TextChunks, sse, take_stream_options
from shoal.requests.outputs import RequestOutput
from shoal.requests.pooled import EmbeddingRequestOutput
from shoal.server.bodies import json_body, json_response, owner_of, service_of
from shoal.server.service import Service, Tickets
from shoal.server.streams import EventStream, unless_gone
from shoal.server.worker import AnyOutput


def routes() -> list[Route]:
    """Those of this file."""
    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
    ]


async def chat(request: Request) -> ASGIApp:
    """An answer to a conversation."""
    service, body = service_of(request), await json_body(request)
    options = take_stream_options(body)
    call = chat_call(service, body)
    return await answered(request, [call], options)


async def completions(request: Request) -> ASGIApp:
    """A text that goes on with each prompt."""
    body = await json_body(request)
    options = take_stream_options(body)
    return await answered(request, parse_completions(body), options)


async def embeddings(request: Request) -> Response:
    """A vector for each input."""
    service, call = service_of(request), parse_embedding(await json_body(request))
    name = uuid.uuid4().hex
    tickets = await unless_gone(request.receive, service.start_embeddings(call, owner_of(request), name))
    try:
        outputs = [_embedded(output) for output in await unless_gone(request.receive, tickets.finished())]
    finally:
        tickets.close()
    return json_response(
        embedding_answer(call, outputs, response_id=name, model=call.model or service.settings.served[0])
    )


def chat_call(service: Service, body: Any) -> Call:
    """A chat as the model's file recommends it, where the body does not say otherwise."""
    if isinstance(body, dict):
        body |= missing(service.llm.chat_defaults, body)
    return parse_chat(body)


async def answered(request: Request, calls: Sequence[Call], options: StreamOptions) -> ASGIApp:
    """The response to chats or completions, whole or as a stream."""
    service, name = service_of(request), uuid.uuid4().hex
    tickets = await unless_gone(request.receive, service.start(calls, owner_of(request), name))
    if options.stream:
        return EventStream(service, tickets, Chunks(service, calls, name, options), log_of(request))
    outputs = await whole(request, tickets)
    model, tokenizer = calls[0].model or service.settings.served[0], service.tokenizer
    if calls[0].kind == "chat":
        return json_response(answer(calls[0], outputs[0], response_id=name, model=model, tokenizer=tokenizer))
    pairs = list(zip(calls, outputs, strict=True))
    return json_response(completions_answer(pairs, response_id=name, model=model, tokenizer=tokenizer))


async def whole(request: Request, tickets: Tickets) -> list[RequestOutput]:
    """The finished outputs. Raises APIError for the first that has failed, ClientGoneError when nobody waits any more."""
    log = log_of(request)
    try:
        outputs = [_generated(output) for output in await unless_gone(request.receive, tickets.finished())]
    finally:
        tickets.close()
    for output in outputs:
        log(output)
        error = failure(output)
        if error is not None:
            raise error
    return outputs


def log_of(request: Request) -> Callable[[RequestOutput], None]:
    """What the access log says of a request's finished outputs: how many tokens, and the texts if that is asked for."""
    state = request.scope.setdefault("state", {})
    with_text, tokenizer = service_of(request).settings.log_prompts, service_of(request).tokenizer

    def log(output: RequestOutput) -> None:
        tokens = state.setdefault("tokens", {"prompt": 0, "completion": 0})
        tokens["prompt"] += len(output.prompt_token_ids)
        tokens["completion"] += sum(len(given.token_ids) for given in output.outputs)
        if with_text:
            texts = state.setdefault("texts", [])
            prompt = output.prompt if output.prompt is not None else tokenizer.decode(output.prompt_token_ids)
            texts.append({"prompt": prompt, "outputs": [given.text for given in output.outputs]})

    return log


class Chunks:
    """A ``Writer`` of OpenAI's chunks."""

    def __init__(self, service: Service, calls: Sequence[Call], name: str, options: StreamOptions) -> None:
        model, tokenizer = calls[0].model or service.settings.served[0], service.tokenizer
        self._chunks: ChatChunks | TextChunks
        if calls[0].kind == "chat":
            self._chunks = ChatChunks(calls[0], response_id=name, model=model, tokenizer=tokenizer, options=options)
        else:
            self._chunks = TextChunks(calls, response_id=name, model=model, tokenizer=tokenizer, options=options)

    def start(self) -> bytes:
        """Nothing: the first chunk comes with the first token."""
        return b""

    def push(self, output: AnyOutput, number: int) -> bytes:
        """The chunks of an output."""
        return self._chunks.frames(_generated(output), number)

    def fail(self, error: APIError) -> bytes:
        """The error, and no [DONE]."""
        return sse(msgspec.json.encode(error.body()))


def _generated(output: AnyOutput) -> RequestOutput:
    assert isinstance(output, RequestOutput), "this ticket is for one"
    return output


def _embedded(output: AnyOutput) -> EmbeddingRequestOutput:
    assert isinstance(output, EmbeddingRequestOutput), "this ticket is for one"
    if output.finish_reason == "stop":
        return output
    late = output.finish_reason == "timeout"
    kind, status = ("timeout_error", 504) if late else ("server_error", 500)
    raise APIError(
        output.error or "the input was not embedded", status=status, kind=kind, code="request_timeout" if late else None
    )
