"""Bodies of requests and responses, and what handlers know of who asks."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from shoal.openai.schema import APIError
from shoal.server.limits import decode_json
from shoal.server.service import Service

_AT_ONCE = 64 * 1024  # bytes: longer bodies are parsed beside the event loop


def service_of(request: Request) -> Service:
    """The state of the server that was asked."""
    service: Service = request.app.state.service
    return service


def owner_of(request: Request) -> str:
    """Whose request it is: a digest of the API key, empty where none are asked for."""
    owner: str = getattr(request.state, "owner", "")
    return owner


async def json_body(request: Request) -> Any:
    """The body, decoded. Raises APIError."""
    data = await request.body()
    if len(data) <= _AT_ONCE:
        return decode_json(data)
    return await service_of(request).in_thread(decode_json, data)


async def json_object(request: Request) -> dict[str, Any]:
    """The body, which must be an object. Raises APIError."""
    body = await json_body(request)
    if not isinstance(body, dict):
        raise APIError("the body must be a JSON object")
    return body


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Any struct or plain value as JSON."""
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")
