"""GET /openapi.json: what the server takes and answers, as OpenAPI 3.1."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from shoal.openai.schema import (
    ChatBody,
    ChatChunk,
    ChatCompletion,
    CompletionBody,
    EmbeddingBody,
    EmbeddingList,
    ErrorBody,
    TextChunk,
    TextCompletion,
)
from shoal.server import openapi_schemas
from shoal.server.openapi_schemas import Schema
from shoal.server.replies import (
    ConversationToTokenize,
    Decoded,
    Health,
    Model,
    ModelList,
    Slot,
    Templated,
    TextToTokenize,
    Tokens,
    TokensToDecode,
    Version,
)
from shoal.server.store.batches import Batch
from shoal.server.store.files import FileInfo
from shoal.server.store.paging import Page
from shoal.version import __version__

# A struct, a list of one, or the name of one of openapi_schemas; a tuple where it may be either; None where it is not JSON.
_Shape: TypeAlias = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A method of a path. ``takes``: its body, of the type ``kind``; ``gives``: its answer, of the type ``media``; ``events``: the data
    of each event of it where the body asks for a stream. ``errors``: statuses, whose bodies have the shape ``error``. ``open``: no
    API key is needed."""

    summary: str
    takes: _Shape = None
    kind: str = "application/json"
    query: Mapping[str, Schema] = field(default_factory=dict)
    gives: _Shape = None
    media: str = "application/json"
    events: _Shape = None
    errors: tuple[str, ...] = ("401",)
    error: _Shape = ErrorBody
    open: bool = False


def routes() -> list[Route]:
    """The one of this file."""
    return [Route("/openapi.json", openapi)]


async def openapi(request: Request) -> Response:
    """The document."""
    return Response(_encoded(), media_type="application/json")


@functools.cache
def _encoded() -> bytes:
    return msgspec.json.encode(document())


def document() -> dict[str, Any]:
    """The OpenAPI document about ``OPERATIONS``."""
    paths: dict[str, Any] = {}
    for (method, path), operation in OPERATIONS.items():
        named = {"operationId": "_".join(re.findall(r"\w+", f"{method.lower()} {path}"))}
        paths.setdefault(path, {})[method.lower()] = named | _described(operation, _PARAMETER.findall(path))
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "shoal",
            "version": __version__,
            "description": "Many language-model requests at once on a GGUF file, behind OpenAI's API and Anthropic's.",
        },
        "security": [{"bearer": []}, {"x_api_key": []}, {}],
        "paths": paths,
        "components": {
            "schemas": _components(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "Where the server has API keys."},
                "x_api_key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same."},
            },
        },
    }


_PARAMETER = re.compile(r"{(\w+)}")


def _described(operation: Operation, parameters: list[str]) -> dict[str, Any]:
    described: dict[str, Any] = {"summary": operation.summary, "responses": _responses(operation)}
    given = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in parameters]
    given += [{"name": name, "in": "query", "schema": schema} for name, schema in operation.query.items()]
    if given:
        described["parameters"] = given
    if operation.takes is not None:
        content = {operation.kind: {"schema": _schema(operation.takes)}}
        described["requestBody"] = {"required": True, "content": content}
    if operation.open:
        described["security"] = [{}]
    return described


def _responses(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {operation.media: {"schema": _schema(operation.gives)}}
    if operation.events is not None:
        told = "Where stream is true: server-sent events, the data of each as x-event says."
        content["text/event-stream"] = {
            "schema": {"type": "string", "description": told, "x-event": _schema(operation.events)}
        }
    failed = {"application/json": {"schema": _schema(operation.error)}}
    return {
        "200": {"description": "The answer.", "content": content},
        **{status: {"description": _ERRORS[status], "content": failed} for status in operation.errors},
    }


def _schema(shape: _Shape) -> Schema:
    if shape is None:
        return {"type": "string"}
    if isinstance(shape, str):
        return openapi_schemas.of(shape)
    if isinstance(shape, tuple):
        return openapi_schemas.either(*map(_schema, shape))
    (schema,), _ = msgspec.json.schema_components([shape], ref_template=_TEMPLATE)
    return schema


def _components() -> dict[str, Schema]:
    """All schemas that are referred to; what the docstrings of structs say is their description."""
    named = [shape for one in OPERATIONS.values() for shape in (one.takes, one.gives, one.events, one.error)]
    shapes = [shape for name in named for shape in (name if isinstance(name, tuple) else (name,))]
    structs = {repr(shape): shape for shape in shapes if shape is not None and not isinstance(shape, str)}
    _, components = msgspec.json.schema_components(structs.values(), ref_template=_TEMPLATE)
    for component in components.values():
        component["description"] = inspect.cleandoc(component.get("description", "")).replace("``", "`")
    return openapi_schemas.completed(components)


_TEMPLATE = openapi_schemas.REF + "{name}"
_ERRORS = {
    "400": "The request is wrong; the error says what in it.",
    "401": "There is no valid API key.",
    "404": "There is no such thing.",
    "408": "Nothing came any more.",
    "409": "It is not in a state for that.",
    "413": "The body is too large.",
    "415": "The body is of the wrong type.",
    "429": "Too many requests wait; retry-after says when to come back.",
    "500": "The request failed.",
    "503": "The server is starting, ending or out of order; retry-after says when to come back.",
    "504": "The request was not finished in time.",
    "507": "The disk is full.",
}
_OF_PROMPTS = ("400", "401", "404", "413", "415", "429", "500", "503", "504")
_OF_TEXTS = ("400", "401", "404", "413", "415", "503")
_PAGE: dict[str, Schema] = {
    "after": {"type": "string"},
    "limit": {"type": "integer", "minimum": 1},
    "order": {"type": "string", "enum": ["asc", "desc"]},
}
_STATE: dict[str, Any] = {"errors": ("503",), "error": Health, "open": True}
_OF_MESSAGES: dict[str, Any] = {"errors": _OF_PROMPTS, "error": "AnthropicError"}

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", "/v1/chat/completions"): Operation(
        summary="An answer to a conversation.",
        takes=ChatBody,
        gives=ChatCompletion,
        events=ChatChunk,
        errors=_OF_PROMPTS,
    ),
    ("POST", "/v1/completions"): Operation(
        summary="A text that goes on with each prompt.",
        takes=CompletionBody,
        gives=TextCompletion,
        events=TextChunk,
        errors=_OF_PROMPTS,
    ),
    ("POST", "/v1/embeddings"): Operation(
        summary="A vector for each input.", takes=EmbeddingBody, gives=EmbeddingList, errors=_OF_PROMPTS
    ),
    ("POST", "/v1/responses"): Operation(
        summary="An answer in the form of OpenAI's Responses; nothing is stored.",
        takes="ResponseBody",
        gives="Response",
        events="ResponseEvent",
        errors=_OF_PROMPTS,
    ),
    ("POST", "/v1/messages"): Operation(
        summary="An answer in the form of Anthropic's Messages.",
        takes="MessageBody",
        gives="Message",
        events="MessageEvent",
        **_OF_MESSAGES,
    ),
    ("POST", "/v1/messages/count_tokens"): Operation(
        summary="How many tokens a prompt of /v1/messages has.", takes="CountBody", gives="TokenCount", **_OF_MESSAGES
    ),
    ("GET", "/v1/models"): Operation(summary="All names of the model.", gives=ModelList),
    ("GET", "/v1/models/{name}"): Operation(summary="One of them.", gives=Model, errors=("401", "404")),
    ("POST", "/tokenize"): Operation(
        summary="The ids of a text or of a conversation.",
        takes=(TextToTokenize, ConversationToTokenize),
        gives=Tokens,
        errors=_OF_TEXTS,
    ),
    ("POST", "/detokenize"): Operation(
        summary="The text of token ids.", takes=TokensToDecode, gives=Decoded, errors=_OF_TEXTS
    ),
    ("POST", "/apply-template"): Operation(
        summary="What a conversation becomes, with the control tokens written out.",
        takes=ChatBody,
        gives=Templated,
        errors=_OF_TEXTS,
    ),
    ("POST", "/v1/files"): Operation(
        summary="Upload what a batch is to read.",
        takes="Upload",
        kind="multipart/form-data",
        gives=FileInfo,
        errors=("400", "401", "408", "413", "415", "500", "507"),
    ),
    ("GET", "/v1/files"): Operation(
        summary="Files of whoever asks, a page at a time.",
        query=_PAGE | {"purpose": {"type": "string"}},
        gives=Page[FileInfo],
        errors=("400", "401"),
    ),
    ("GET", "/v1/files/{file_id}"): Operation(summary="About a file.", gives=FileInfo, errors=("401", "404")),
    ("DELETE", "/v1/files/{file_id}"): Operation(
        summary="Delete a file.", gives="Deleted", errors=("400", "401", "404", "409")
    ),
    ("GET", "/v1/files/{file_id}/content"): Operation(
        summary="What is in a file.", media="application/octet-stream", errors=("401", "404")
    ),
    ("POST", "/v1/batches"): Operation(
        summary="Run the requests of a file beneath all other traffic.",
        takes="BatchBody",
        gives=Batch,
        errors=("400", "401", "404", "413", "415", "429", "500", "503", "507"),
    ),
    ("GET", "/v1/batches"): Operation(
        summary="Batches of whoever asks, a page at a time.", query=_PAGE, gives=Page[Batch], errors=("400", "401")
    ),
    ("GET", "/v1/batches/{batch_id}"): Operation(summary="How far a batch is.", gives=Batch, errors=("401", "404")),
    ("POST", "/v1/batches/{batch_id}/cancel"): Operation(
        summary="End a batch early.", gives=Batch, errors=("400", "401", "404", "409", "415")
    ),
    ("GET", "/health"): Operation(
        summary="200 while the engine moves on and new requests are taken.", gives=Health, **_STATE
    ),
    ("GET", "/live"): Operation(summary="200 while the process can still finish its work.", gives=Health, **_STATE),
    ("GET", "/metrics"): Operation(summary="What Prometheus reads.", media="text/plain"),
    ("GET", "/slots"): Operation(summary="Where each sequence is in the engine.", gives=list[Slot]),
    ("GET", "/version"): Operation(summary="Of shoal.", gives=Version),
    ("GET", "/openapi.json"): Operation(summary="This document.", gives=dict[str, Any]),
}
