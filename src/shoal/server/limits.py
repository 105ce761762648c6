"""What a request must be before a route sees it: asked of the right host, by the right page, of the right type and size. Plain ASGI."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Mapping
from itertools import accumulate
from typing import Any
from urllib.parse import urlsplit

import msgspec
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.errors import ParameterError
from shoal.openai.schema import APIError, parse_json
from shoal.server.errors import ErrorBody, error_response, openai_body

BODY_BYTES = 2 << 20
JSON_DEPTH = 128

_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")


async def refuse(
    scope: Scope,
    receive: Receive,
    send: Send,
    error: APIError,
    body: ErrorBody,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Answer with an error in place of the app."""
    await error_response(error, body(scope["path"], error), headers)(scope, receive, send)


# Who asks, and whom ---------------------------------------------------------------------------------------------------


def allowed_hosts(bind: str | None, extra: Collection[str]) -> frozenset[str] | None:
    """The hosts that a server on the address ``bind`` (None: a Unix socket) answers to; None for all of them.

    On loopback these are its usual names and ``extra``: a web page whose own name leads to 127.0.0.1 does not get in. Elsewhere a
    server cannot know its names: only ``extra`` narrows them. "*" in ``extra`` is every host. Raises ParameterError.
    """
    named = frozenset(_checked_host(name) for name in extra)
    if "*" in named or (not named and not _is_loopback(bind)):
        return None
    return named | _LOOPBACK | ({_literal(bind)} if bind else set())


def _checked_host(name: str) -> str:
    lowered = name.lower()
    if lowered != "*" and _host_name(lowered) != lowered:
        raise ParameterError("allowed_host", name, "a host without a port, or '*'")
    return lowered


def _is_loopback(bind: str | None) -> bool:
    try:
        return bind == "localhost" or ipaddress.ip_address(bind or "").is_loopback
    except ValueError:
        return False


def _literal(bind: str) -> str:
    return f"[{bind.lower()}]" if ":" in bind else bind.lower()


def _host_name(value: str) -> str | None:
    """The host of a Host header without its port; None where it is not one."""
    found = _HOST.fullmatch(value.lower())
    return found[1].rstrip(".") if found else None


class HostCheck:
    """Refuses requests for a host that is not ours: 421, or 400 where there is no telling which."""

    def __init__(self, app: ASGIApp, allowed: frozenset[str] | None, body: ErrorBody = openai_body) -> None:
        self._app = app
        self._allowed = allowed
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        error = self._error(scope) if scope["type"] == "http" else None
        if error is not None:
            await refuse(scope, receive, send, error, self._body)
        else:
            await self._app(scope, receive, send)

    def _error(self, scope: Scope) -> APIError | None:
        values = Headers(scope=scope).getlist("host")
        if not values and scope["http_version"] == "1.0":
            return None
        host = _host_name(values[0]) if len(values) == 1 else None
        if host is None:
            return APIError("the request needs one Host header, a name or address with an optional port")
        if self._allowed is not None and host not in self._allowed:
            return APIError(
                f"this server does not answer for host {host!r}; --allowed-host {host} would let it", status=421
            )
        return None


class OriginCheck:
    """Refuses what a page of another site asks for: 403. A page of this server is one whose origin is the Host that it asks."""

    def __init__(self, app: ASGIApp, allowed: Collection[str] = (), body: ErrorBody = openai_body) -> None:
        self._app = app
        self._allowed = frozenset(_checked_origin(origin) for origin in allowed)
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or self._is_allowed(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        error = APIError(
            "pages of another origin may not ask this server; --cors-origin ORIGIN would let them", status=403
        )
        await refuse(scope, receive, send, error, self._body)

    def _is_allowed(self, headers: Headers) -> bool:
        origins = headers.getlist("origin")
        if not origins or "*" in self._allowed:
            return True
        return len(origins) == 1 and (origins[0] in self._allowed or _is_own(origins[0], headers.get("host", "")))


def _checked_origin(origin: str) -> str:
    parts = urlsplit(origin)
    if origin != "*" and (parts.scheme not in _DEFAULT_PORTS or origin != f"{parts.scheme}://{parts.netloc}"):
        raise ParameterError("cors_origin", origin, "an origin such as https://example.org, or '*'")
    return origin


def _is_own(origin: str, host: str) -> bool:
    scheme, _, place = origin.lower().partition("://")
    default = _DEFAULT_PORTS.get(scheme)
    return default is not None and place.removesuffix(default) == host.lower().removesuffix(default)


# What it brings -------------------------------------------------------------------------------------------------------


class ContentType:
    """Refuses bodies that are not application/json (on the paths of ``uploads``: multipart/form-data), or compressed: 415.

    A page of another site can send neither without asking first. A POST without a body needs no type.
    """

    def __init__(self, app: ASGIApp, uploads: Collection[str] = (), body: ErrorBody = openai_body) -> None:
        self._app = app
        self._uploads = frozenset(uploads)
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        error = self._error(scope) if scope["type"] == "http" and scope["method"] in _WITH_BODY else None
        if error is not None:
            await refuse(scope, receive, send, error, self._body)
        else:
            await self._app(scope, receive, send)

    def _error(self, scope: Scope) -> APIError | None:
        headers = Headers(scope=scope)
        if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
            return None
        wanted = "multipart/form-data" if scope["path"] in self._uploads else "application/json"
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != wanted:
            return APIError(f"Content-Type must be {wanted}, not {media_type or 'left out'!r}", status=415)
        if headers.get("content-encoding", "identity").lower() != "identity":
            return APIError("the body must not be compressed", status=415)
        return None


class BodyLimit:
    """Refuses bodies of more than ``limit`` bytes, or what ``uploads`` says for their path: 413, whatever their headers say.

    The app gets a body whole, and is not called before it is here. An upload it reads as it comes: there ``receive`` raises the
    APIError.
    """

    def __init__(
        self,
        app: ASGIApp,
        limit: int = BODY_BYTES,
        uploads: Mapping[str, int] | None = None,
        body: ErrorBody = openai_body,
    ) -> None:
        self._app = app
        self._limit = limit
        self._uploads = uploads or {}
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        upload = self._uploads.get(scope["path"])
        counted = _counted(receive, self._limit if upload is None else upload)
        try:
            _check_size(_announced(scope), self._limit if upload is None else upload)
            whole = counted if upload is not None else await _read_ahead(counted)
        except APIError as error:
            await refuse(scope, receive, send, error, self._body)
            return
        if whole is not None:
            await self._app(scope, whole, send)


def _announced(scope: Scope) -> int:
    value = Headers(scope=scope).get("content-length", "0")
    return int(value) if value.isdecimal() and len(value) < 20 else 0


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise APIError(f"the body may have {limit} bytes", status=413)


def _counted(receive: Receive, limit: int) -> Receive:
    size = 0

    async def counted() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        _check_size(size, limit)
        return message

    return counted


async def _read_ahead(receive: Receive) -> Receive | None:
    """A ``receive`` that gives the whole body as one message, and then what is to come; None where the client has gone."""
    pieces = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
    waiting: list[Message] = [{"type": "http.request", "body": b"".join(pieces), "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


# JSON -----------------------------------------------------------------------------------------------------------------

_STRING = re.compile(
    rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL
)  # the last may be unfinished: it never tries again from within
_BRACKETS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NO_BRACKETS = bytes(set(range(256)) - _BRACKETS.keys())


def decode_json(data: bytes) -> Any:
    """A value in JSON, without NaN, Infinity, numbers beyond a double, lone surrogates, or nesting past ``JSON_DEPTH``.

    Raises APIError; ``param`` is where in the value the fault is.
    """
    if _depth(data) > JSON_DEPTH:
        raise APIError(f"the JSON is nested too deeply: {JSON_DEPTH} levels are allowed")
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        value = parse_json(data)  # says what is wrong with JSON that is none, and reads what is nearly JSON
    _refuse_inside(value, "")
    return value


def _depth(data: bytes) -> int:
    brackets = data.translate(None, _NO_BRACKETS)
    if len(brackets) <= JSON_DEPTH:  # most bodies
        return 0
    brackets = _STRING.sub(b"", data).translate(None, _NO_BRACKETS)
    return max(accumulate(map(_BRACKETS.__getitem__, brackets)), default=0)


def _refuse_inside(value: Any, place: str) -> None:
    if isinstance(value, float) and not abs(value) < float("inf"):
        raise APIError("a number must be finite", place or None)
    if isinstance(value, str):
        _refuse_surrogates(value, place)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_inside(item, f"{place}[{index}]")
    elif isinstance(value, dict):
        for name, item in value.items():
            _refuse_surrogates(name, place)
            _refuse_inside(item, f"{place}.{name}" if place else name)


def _refuse_surrogates(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise APIError("a text must not contain half a surrogate pair", place or None) from None
