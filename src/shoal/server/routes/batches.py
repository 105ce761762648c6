"""/v1/batches: files of requests, run beneath all other traffic."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from shoal.openai.convert import PARSERS
from shoal.openai.embeddings import EMBEDDINGS
from shoal.openai.fields import did_you_mean
from shoal.openai.schema import APIError, parse_json
from shoal.server.bodies import json_response, owner_of
from shoal.server.routes.queries import page_query
from shoal.server.store.batches import WINDOW
from shoal.server.store.runner import BatchRunner
from shoal.server.store.store import Store

ENDPOINTS = (*PARSERS, EMBEDDINGS)

_MOST_LISTED, _LISTED = 100, 20
_MOST_PAIRS, _MOST_KEY, _MOST_VALUE = 16, 64, 512  # of metadata, as OpenAI
_FIELDS = ("input_file_id", "endpoint", "completion_window", "metadata")


class _Asked(msgspec.Struct):
    input_file_id: str
    endpoint: str
    metadata: dict[str, str] | None


def routes(store: Store, runner: BatchRunner) -> list[Route]:
    """``runner`` works off the batches of ``store``."""
    return [
        Route("/v1/batches", partial(_create, runner), methods=["POST"]),
        Route("/v1/batches", partial(_list, store), methods=["GET"]),
        Route("/v1/batches/{batch_id}", partial(_retrieve, store), methods=["GET"]),
        Route("/v1/batches/{batch_id}/cancel", partial(_cancel, runner), methods=["POST"]),
    ]


async def _create(runner: BatchRunner, request: Request) -> Response:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise APIError("the body must be application/json", status=415)
    asked = _asked(parse_json(await request.body()))
    batch = await run_in_threadpool(
        runner.create, owner_of(request), asked.input_file_id, asked.endpoint, asked.metadata
    )
    return json_response(batch)


async def _list(store: Store, request: Request) -> Response:
    return json_response(store.batches.page(owner_of(request), page_query(request, _MOST_LISTED, _LISTED)))


async def _retrieve(store: Store, request: Request) -> Response:
    return json_response(store.batches.get(owner_of(request), request.path_params["batch_id"]))


async def _cancel(runner: BatchRunner, request: Request) -> Response:
    batch = await run_in_threadpool(runner.cancel, owner_of(request), request.path_params["batch_id"])
    return json_response(batch)


def _asked(body: Any) -> _Asked:
    """Raises APIError that names the field at fault."""
    if not isinstance(body, dict):
        raise APIError("the body must be a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    for name in given:
        if name == "output_expires_after":
            raise APIError(f"{name}: not supported: files stay until they are deleted", name)
        if name not in _FIELDS:
            raise APIError(f"{name}: no such field{did_you_mean(name, _FIELDS)}", name)
    for name in _FIELDS[:3]:
        if name not in given:
            raise APIError(f"{name}: this field is required", name)
        if not isinstance(given[name], str):
            raise APIError(f"{name}: must be a text", name)
    _refuse_other("endpoint", given["endpoint"], ENDPOINTS)
    _refuse_other("completion_window", given["completion_window"], (WINDOW,))
    return _Asked(given["input_file_id"], given["endpoint"], _metadata(given.get("metadata")))


def _refuse_other(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise APIError(f"{name}: got {value!r}, must be one of {', '.join(allowed)}", name)


def _metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > _MOST_PAIRS:
        raise APIError(f"metadata: must be an object of at most {_MOST_PAIRS} texts", "metadata")
    for key, text in value.items():
        if not isinstance(text, str) or len(key) > _MOST_KEY or len(text) > _MOST_VALUE:
            limits = f"keys of at most {_MOST_KEY} characters and texts of at most {_MOST_VALUE}"
            raise APIError(f"metadata: must have {limits}", "metadata")
        if not _is_text(key) or not _is_text(text):
            raise APIError("metadata: holds a lone surrogate, which no text has", "metadata")
    return value


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
