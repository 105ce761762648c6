"""The outermost layer of the app: an id for every request, a line in the log for it, and an answer where the app has failed."""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import re
import sys
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.server.errors import ErrorBody, internal_error, openai_body
from shoal.server.limits import refuse

_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_LONGEST_PATH = 200
_CLIENT_GONE = 499  # nginx's number for a request whose client did not wait for the answer
_access = logging.getLogger("shoal.access")
_faults = logging.getLogger("shoal.server")


class Access:
    """Gives requests their ``scope["state"]["request_id"]``, which every answer carries as X-Request-Id: the client's own, if it is
    short and plain.

    A route may leave ``scope["state"]["tokens"]`` (as ``{"prompt": 12, "completion": 30}``) for the log, and
    ``texts`` if those are asked for.
    """

    def __init__(self, app: ASGIApp, body: ErrorBody = openai_body) -> None:
        self._app = app
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        request_id = request_id_of(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", [])
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except (ClientDisconnect, ConnectionError, asyncio.CancelledError):
            pass  # the client is gone, or the server could not wait for the answer: uvicorn closes the connection
        except Exception:
            _faults.exception("a request failed", extra={"fields": {"id": request_id, "path": _path(scope)}})
            if status is None:
                await refuse(scope, receive, send_with_id, internal_error(request_id), self._body)
        if _access.isEnabledFor(logging.INFO):
            _access.info("request", extra={"fields": _line(scope, status, time.perf_counter() - began)})


def request_id_of(scope: Scope) -> str:
    """The id that the client gave its request, or a new one."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _ID.fullmatch(given) else uuid.uuid4().hex


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path if len(path) <= _LONGEST_PATH else path[: _LONGEST_PATH - 3] + "..."


def _line(scope: Scope, status: int | None, seconds: float) -> dict[str, Any]:
    state = scope["state"]
    line = {
        "id": state["request_id"],
        "method": scope["method"],
        "path": _path(scope),
        "status": _CLIENT_GONE if status is None else status,
        "seconds": round(seconds, 6),
    }
    return line | {name: state[name] for name in ("owner", "tokens", "texts") if state.get(name)}


# The log --------------------------------------------------------------------------------------------------------------


class JSONLines(logging.Formatter):
    """A JSON object a line: time (UTC), level, logger, message, and the record's ``fields``."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line = {
            "time": when,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_logging(*, access_log: bool) -> None:
    """Log lines of the whole process go to stderr: warnings and errors, and with ``access_log`` a line for every request."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONLines())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    _access.setLevel(logging.INFO if access_log else logging.CRITICAL)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # warns of every malformed request that anybody sends
