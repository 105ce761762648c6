"""Errors as HTTP responses. Which shape the body has depends on the path: each API's clients read their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from shoal.openai.schema import APIError

# The JSON of an error that a request to this path got.
ErrorBody = Callable[[str, APIError], bytes]


def openai_body(path: str, error: APIError) -> bytes:
    """OpenAI's error object, whatever the path."""
    return msgspec.json.encode(error.body())


def error_response(error: APIError, body: bytes, headers: Mapping[str, str] | None = None) -> Response:
    """``body`` as the response to a request that failed with ``error``."""
    return Response(body, error.status, headers, media_type="application/json")


def exception_handlers(body: ErrorBody = openai_body) -> dict[Any, Callable[[Request, Exception], Response]]:
    """For ``Starlette(exception_handlers=...)``: refusals by routes, by the router (404, 405), and what nobody expected (500)."""

    def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, APIError)
        return error_response(error, body(request.url.path, error))

    def routed(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(found := _as_api_error(request, error), body(request.url.path, found), error.headers)

    def unexpected(request: Request, error: Exception) -> Response:
        found = internal_error(getattr(request.state, "request_id", ""))
        return error_response(found, body(request.url.path, found))

    return {APIError: refused, HTTPException: routed, Exception: unexpected}


def internal_error(request_id: str) -> APIError:
    """What a client is told about a fault of ours: nothing but where the log has more."""
    where = f"; the server's log has more under request id {request_id}" if request_id else ""
    return APIError(f"internal error{where}", status=500, kind="server_error")


def _as_api_error(request: Request, error: HTTPException) -> APIError:
    message = error.detail
    if error.status_code == 404:
        message = f"no such path: {request.url.path}"
    elif error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}, only {(error.headers or {}).get('Allow', '')}"
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    return APIError(message, status=error.status_code, kind=kind)
