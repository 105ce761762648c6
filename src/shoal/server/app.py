"""The ASGI application: routes, and how errors are told."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from shoal.openai.schema import APIError
from shoal.server.bodies import json_response, service_of
from shoal.server.room import TooManyWaitingError
from shoal.server.routes import completions, dialects, status, text
from shoal.server.service import Service
from shoal.server.streams import ClientGoneError

_log = logging.getLogger(__name__)

_CLIENT_GONE = 499  # nginx's word for it; nobody reads it


def create_app(service: Service, more_routes: Sequence[BaseRoute] = ()) -> Starlette:
    """The application over ``service``, whose engine is started and ended with it."""
    app = Starlette(
        routes=[*completions.routes(), *dialects.routes(), *text.routes(), *status.routes(), *more_routes],
        exception_handlers={
            APIError: _refused,
            ClientGoneError: _gone,
            HTTPException: _http_error,
            Exception: _unforeseen,
        },
        lifespan=_lifespan,
    )
    app.state.service = service
    return app


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
    headers = {"retry-after": str(error.retry_after)} if isinstance(error, TooManyWaitingError) else {}
    if error.status == 503:
        headers["retry-after"] = str(service_of(request).room.retry_after)
    return json_response(error.body(), error.status, headers)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_GONE)


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    what = {404: f"there is no {request.url.path}", 405: f"{request.url.path} does not take {request.method}"}
    return await _refused_with(
        APIError(what.get(error.status_code, str(error.detail)), status=error.status_code), error
    )


async def _refused_with(told: APIError, error: HTTPException) -> Response:
    return json_response(told.body(), told.status, dict(error.headers or {}))


async def _unforeseen(request: Request, error: Exception) -> Response:
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    told = APIError("the server failed to answer; its log says why", status=500, kind="server_error")
    return json_response(told.body(), told.status)
