"""The ASGI application: routes, and how errors are told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from shoal.anthropic.messages import error_body
from shoal.openai.schema import APIError
from shoal.server import openapi
from shoal.server.bodies import service_of
from shoal.server.errors import error_response, openai_body
from shoal.server.room import TooManyWaitingError
from shoal.server.routes import completions, dialects, status, text
from shoal.server.service import Service
from shoal.server.streams import ClientGoneError

_CLIENT_GONE = 499  # nginx's word for it; nobody reads it


def create_app(service: Service, more_routes: Sequence[BaseRoute] = ()) -> Starlette:
    """The application over ``service``, whose engine is started and ended with it. What nobody foresaw is for who calls it
    (``access.Access``) to tell."""
    app = Starlette(
        routes=[
            *completions.routes(),
            *dialects.routes(),
            *text.routes(),
            *status.routes(),
            *openapi.routes(),
            *more_routes,
        ],
        exception_handlers={
            APIError: _refused,
            HTTPException: _not_routed,
            ClientGoneError: _gone,
        },
        lifespan=_lifespan,
    )
    app.state.service = service
    return app


def body_of_error(path: str, error: APIError) -> bytes:
    """An error in the shape that the clients of a path read."""
    if path.startswith("/v1/messages"):
        return msgspec.json.encode(error_body(error))
    return openai_body(path, error)


@contextlib.asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    service: Service = app.state.service
    service.worker.start(asyncio.get_running_loop())
    ticking = asyncio.ensure_future(_tick(service))
    try:
        yield
    finally:
        ticking.cancel()
        await asyncio.to_thread(service.close)


async def _tick(service: Service) -> None:
    while True:
        await asyncio.sleep(1)
        service.metrics.tick()


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    headers = {}
    if isinstance(error, TooManyWaitingError):
        headers["retry-after"] = str(error.retry_after)
    elif error.status == 503:
        headers["retry-after"] = str(service_of(request).room.retry_after)
    return error_response(error, body_of_error(request.url.path, error), headers)


async def _not_routed(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    path, headers = request.url.path, dict(error.headers or {})
    known = {
        404: f"no such path: {path}",
        405: f"{path} does not take {request.method}, only {headers.get('Allow', '')}",
    }
    told = APIError(known.get(error.status_code, str(error.detail)), status=error.status_code)
    return error_response(told, body_of_error(path, told), headers)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_GONE)
