"""API keys: who may ask, and whose a request is. Nothing here writes a key anywhere, or keeps it longer than to hash it."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from shoal.errors import ParameterError
from shoal.openai.schema import APIError
from shoal.server.errors import ErrorBody, openai_body
from shoal.server.limits import refuse

VARIABLE = "SHOAL_API_KEY"
_LONGEST = 512  # bytes
_OPEN = frozenset({"/", "/live", "/health"})
_OPEN_FOLDER = "/page/assets/"


def read_keys(given: Sequence[str], file: Path | None, variable: str | None) -> tuple[str, ...]:
    """The keys of ``--api-key``, of ``--api-key-file`` (one a line; empty lines and # comments count for nothing) and of the
    environment's SHOAL_API_KEY (several with commas between them; empty is as if it were not set).

    Raises ParameterError for what cannot be a key, and for a file without any: it would leave the server open.
    """
    found = [_checked("api_key", key) for key in given]
    if file is not None:
        found += _keys_of_file(file)
    found += [_checked(VARIABLE, key.strip()) for key in (variable or "").split(",") if key.strip()]
    return tuple(dict.fromkeys(found))


def _keys_of_file(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as problem:
        reason = getattr(problem, "strerror", None) or "not text in UTF-8"
        raise ParameterError("api_key_file", str(file), f"a readable file with a key a line: {reason}") from None
    keys = [_checked("api_key_file", line) for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ParameterError("api_key_file", str(file), "a file with at least one key")
    return keys


def _checked(field: str, key: str) -> str:
    """The key itself. What is wrong with one is said without showing it."""
    if not key or len(key) > _LONGEST or not all("!" <= character <= "~" for character in key):
        raise ParameterError(field, "...", f"1 to {_LONGEST} printable ASCII characters without spaces")
    return key


class Keys:
    """The keys that a server knows, by their hashes. None at all: everybody may ask."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._owners = {_hash(key.encode()): _owner(key.encode()) for key in keys}

    def __bool__(self) -> bool:
        return bool(self._owners)

    def owner(self, presented: bytes) -> str | None:
        """Whose key it is; None for an unknown one. Takes the same time whichever key it is or resembles."""
        digest = _hash(presented)
        found = None
        for known, owner in self._owners.items():
            if hmac.compare_digest(digest, known):
                found = owner
        return found


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _owner(key: bytes) -> str:
    """A name for whoever has the key, the same in every run: files and batches keep it."""
    return hashlib.blake2b(key, digest_size=8, person=b"shoal owner").hexdigest()


class RequireKey:
    """Refuses requests without a key that we know: 401. ``scope["state"]["owner"]`` is whose it is, "" where no key is needed.

    Open to all: /live, /health and the page with its files.
    """

    def __init__(self, app: ASGIApp, keys: Keys, body: ErrorBody = openai_body) -> None:
        self._app = app
        self._keys = keys
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        owner = "" if self._is_open(scope["path"]) else self._owner(Headers(scope=scope))
        if owner is None:
            error = APIError(
                "a valid API key is needed: 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                status=401,
                kind="authentication_error",
                code="invalid_api_key",
            )
            await refuse(scope, receive, send, error, self._body, {"WWW-Authenticate": "Bearer"})
            return
        scope.setdefault("state", {})["owner"] = owner
        await self._app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return not self._keys or path in _OPEN or path.startswith(_OPEN_FOLDER)

    def _owner(self, headers: Headers) -> str | None:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        presented = [token.strip()] if scheme.lower() == "bearer" else []
        presented += headers.getlist("x-api-key")
        owners = [self._keys.owner(key.encode("latin-1")) for key in presented]
        return next((owner for owner in owners if owner is not None), None)
