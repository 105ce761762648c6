"""The dashboard: its files at ``/`` and ``/page/assets/``, what it shows at ``/page/state``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from shoal.server.bodies import json_response

HOME = "/"
ASSETS = "/page/assets/"
STATE = "/page/state"
INDEX = "index.html"

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}

# Nothing from elsewhere and nothing inline: what a model writes stays text, whatever it looks like.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
)
_HEADERS: dict[str, str] = {
    "Cache-Control": "no-cache",  # kept, but asked about each time: the answer is 304 until the file is another
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_STATE_HEADERS = _HEADERS | {"Cache-Control": "no-store"}


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file of the page, in memory."""

    content: bytes
    media_type: str
    etag: str


def page_folder() -> Traversable:
    """The page's files as they are installed."""
    return files("shoal.server") / "page"


def routes(folder: Traversable, state: Callable[[], Mapping[str, object]]) -> list[Route]:
    """The page's routes over the files in ``folder``; all are read here, so no path of a request ever reaches the disk.

    ``state`` is called on the event loop, once a second for each page that is open, and must return at once; docs/server.md has its
    fields. Where keys are set, ``STATE`` needs one and nothing else here does.
    """
    page_files = dict(_page_files(folder))

    async def index(request: Request) -> Response:
        return _answer(request, page_files[INDEX])

    async def asset(request: Request) -> Response:
        file = page_files.get(request.path_params["name"])
        return PlainTextResponse("no such file\n", 404, _HEADERS) if file is None else _answer(request, file)

    async def show_state(request: Request) -> Response:
        return json_response(state(), headers=_STATE_HEADERS)

    return [Route(HOME, index), Route(ASSETS + "{name:path}", asset), Route(STATE, show_state)]


def _page_files(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, PageFile]]:
    for entry in folder.iterdir():
        name = prefix + entry.name
        media_type = MEDIA_TYPES.get(entry.name[entry.name.rfind(".") :])
        if entry.is_dir():
            yield from _page_files(entry, f"{name}/")
        elif media_type is not None:
            content = entry.read_bytes()
            yield name, PageFile(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _answer(request: Request, file: PageFile) -> Response:
    headers = _HEADERS | {"ETag": file.etag}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)
