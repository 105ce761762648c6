"""Errors as HTTP responses. Which shape the body has depends on the path: each API's clients read their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
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


def internal_error(request_id: str) -> APIError:
    """What a client is told about a fault of ours: nothing but where the log has more."""
    where = f"; the server's log has more under request id {request_id}" if request_id else ""
    return APIError(f"internal error{where}", status=500, kind="server_error")
