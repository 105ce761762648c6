"""A replica: the server of one machine inside an actor of Ray Serve, listening for the ingress alone."""

from __future__ import annotations

import asyncio
import hmac
import queue
import secrets
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

import ray
from ray import serve

from shoal import hub
from shoal.errors import EngineError, ParameterError
from shoal.llm import LLM
from shoal.openai.schema import APIError
from shoal.params import EngineConfig
from shoal.server.access import Access
from shoal.server.app import body_of_error, create_app
from shoal.server.limits import refuse
from shoal.server.protocol import Bounds
from shoal.server.run import Server, Serving
from shoal.server.service import Service
from shoal.server.settings import ServerSettings, served_names

SECRET, OWNER = b"x-shoal-secret", b"x-shoal-owner"  # headers, from the ingress alone
SECRET_VARIABLE = "SHOAL_SERVE_SECRET"
_SHORTEST, _LONGEST = 16, 512  # characters of it
_ENDED = ("wedged", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What each replica serves, and how: ``model`` as for LLM, ``served`` its names (none: by the model), ``settings`` the other fields
    of ServerSettings. ``secret`` is what the ingress shows."""

    model: str
    config: EngineConfig
    served: tuple[str, ...]
    settings: Mapping[str, Any]
    secret: str = field(repr=False)


class State(NamedTuple):
    """Where a replica listens, how it is (requests under way, and its health in the server's words), and whom it lets in: ``app`` is
    ``name_of`` the secret."""

    name: str
    host: str
    port: int
    in_flight: int
    health: str
    app: str


def read_secret(variable: str | None) -> str:
    """The secret of an application: the environment's SHOAL_SERVE_SECRET, a new one where that is empty. Raises ParameterError."""
    if not variable:
        return secrets.token_hex(32)
    if not _SHORTEST <= len(variable) <= _LONGEST or not all("!" <= character <= "~" for character in variable):
        raise ParameterError(
            SECRET_VARIABLE, "...", f"{_SHORTEST} to {_LONGEST} printable ASCII characters without spaces"
        )
    return variable


def name_of(secret: str) -> str:
    """What may be known of a secret: the same for ingress and replicas that belong together."""
    return blake2b(secret.encode(), digest_size=8).hexdigest()


class Replica:
    """What Ray Serve starts so many times, watches and ends. Its server takes requests when the constructor returns.

    Raises as LLM does where the model cannot be run.
    """

    def __init__(self, setup: Setup) -> None:
        path = hub.resolve(setup.model)
        settings = ServerSettings(
            engine=setup.config, served=setup.served or served_names(setup.model, path), **setup.settings
        )
        self._service = Service(lambda: LLM(path, config=setup.config), settings)
        self._app = name_of(setup.secret)
        self._inside = Inside(Access(create_app(self._service), body_of_error), setup.secret)
        serving = Serving(
            host=ray.util.get_node_ip_address(),
            port=0,
            drain_seconds=settings.drain_timeout,
            bounds=Bounds(stall_seconds=settings.stall_timeout),
        )
        self._server = Server(self._inside, serving, on_drain=self._begin_to_drain)
        self._thread = threading.Thread(target=self._serve, name="shoal-server", daemon=True)
        self._begun: queue.Queue[str | Exception] = queue.Queue()
        self._host, self._port = self._start()

    def state(self) -> State:
        """For the ingress."""
        name = serve.get_replica_context().replica_id.unique_id
        return State(name, self._host, self._port, self._inside.in_flight, self._service.health, self._app)

    def metrics(self) -> tuple[str, str]:
        """Its name, and what Prometheus would read."""
        return self.state().name, self._service.metrics.exposition().decode()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For ``scaling.by_requests``; a name and place that Ray Serve asks for."""
        return {"requests": float(self._inside.in_flight)}

    def check_health(self) -> None:
        """Raises EngineError where it will do nothing more: Ray Serve then puts another replica in its place."""
        health, broken = self._service.health, self._service.worker.broken
        if health in _ENDED or broken is not None:
            raise EngineError(f"the engine is {health}: {self._service.worker.error or broken or 'no step'}")

    async def __del__(self) -> None:
        """Ray Serve's last call: what is under way has ``drain_timeout`` seconds to end."""
        self._server.stop()
        await asyncio.to_thread(self._thread.join)

    def _start(self) -> tuple[str, int]:
        self._thread.start()
        begun = self._begun.get()
        if isinstance(begun, Exception):
            raise begun
        self._service.worker.ready.wait()
        error = self._service.worker.error
        if error is not None:
            self._server.stop()
            raise error
        host, _, port = begun.removeprefix("http://").rpartition(":")
        return host.strip("[]"), int(port)

    def _serve(self) -> None:
        try:
            self._server.main(self._begun.put)
        except Exception as error:
            self._begun.put(error)

    def _begin_to_drain(self) -> None:
        self._service.draining = True


class Inside:
    """Lets the ingress in, which says whose the request is, and nobody else: 403. Counts what is under way."""

    def __init__(self, app: Callable[..., Awaitable[None]], secret: str) -> None:
        self._app, self._secret = app, secret.encode()
        self.in_flight = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if not hmac.compare_digest(headers.get(SECRET, b""), self._secret):
            await refuse(
                scope, receive, send, APIError("only for the ingress of this application", status=403), body_of_error
            )
            return
        scope.setdefault("state", {})["owner"] = headers.get(OWNER, b"").decode()
        self.in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self.in_flight -= 1
