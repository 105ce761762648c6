"""All that stands before the routes, in its order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from shoal.server.access import Access
from shoal.server.errors import ErrorBody, openai_body
from shoal.server.keys import Keys, RequireKey
from shoal.server.limits import BODY_BYTES, BodyLimit, ContentType, HostCheck, OriginCheck


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """Who may ask what: ``hosts`` from ``limits.allowed_hosts``, ``cors_origins`` whose pages may ask, ``keys``.

    ``uploads``: the paths that take multipart bodies, each with its limit in bytes; all others take JSON of up to ``body_bytes``.
    """

    hosts: frozenset[str] | None = None
    cors_origins: tuple[str, ...] = ()
    keys: Keys = field(default_factory=lambda: Keys(()))
    body_bytes: int = BODY_BYTES
    uploads: Mapping[str, int] = field(default_factory=dict)
    error_body: ErrorBody = openai_body


def behind(front: Front, app: ASGIApp) -> ASGIApp:
    """``app`` with everything in front of it. Refusals come before any byte of a body is read. Raises ParameterError."""
    body = front.error_body
    app = BodyLimit(app, front.body_bytes, front.uploads, body)
    app = ContentType(app, front.uploads.keys(), body)
    app = RequireKey(app, front.keys, body)
    if front.cors_origins:  # before the keys: browsers ask without one whether they may ask with one
        app = CORSMiddleware(
            app,
            allow_origins=front.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "retry-after"),
        )
    app = OriginCheck(app, front.cors_origins, body)
    app = HostCheck(app, front.hosts, body)
    return Access(app, body)
