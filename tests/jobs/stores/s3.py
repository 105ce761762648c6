"""An S3 of one's own: moto's server, which can end or stop a client at one of its requests."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
import uuid
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

Moment = Literal["before", "after"]
Act = Literal["kill", "sleep"]

_WAIT = 60.0  # seconds


class S3:
    """A server, ``environment`` is how clients find it. A context manager."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
        self.gate = Gate(DomainDispatcherApplication(create_backend_app))
        self._server = make_server("127.0.0.1", 0, self.gate, threaded=True, request_handler=MotoRequestHandler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._bucket = uuid.uuid4().hex  # all servers of a process have the same ones
        self._numbers = itertools.count()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def new_folder(self) -> str:
        """The URL of one that nobody has used."""
        return f"s3://{self._bucket}/{next(self._numbers)}/out/"

    def __enter__(self) -> S3:
        import boto3

        self._thread.start()
        variables = self.environment
        client = boto3.client(
            "s3",
            endpoint_url=variables["AWS_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=self._bucket)
        client.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Gate:
    """Lets requests through one at a time, so that of two that create one object one comes first.

    ``requests`` are their methods and paths. ``overwrites``: the server knows no If-None-Match.
    """

    def __init__(self, app: Any) -> None:
        self.requests: list[tuple[str, str]] = []
        self.overwrites = False
        self.asleep = threading.Event()
        self._app = app
        self._one_at_a_time = threading.Lock()
        self._armed: tuple[int, Moment, Act] | None = None
        self._pid: int | None = None
        self._known = threading.Event()
        self._woken = threading.Event()

    def arm(self, at: int, moment: Moment, act: Act) -> None:
        """At the ``at``-th request from now (from 0), before or after it takes effect, kill the client, or stop it until ``wake``."""
        self.requests.clear()
        for event in (self.asleep, self._known, self._woken):
            event.clear()
        self._armed = (at, moment, act)

    def disarm(self) -> None:
        self._armed = None
        self.requests.clear()

    def tell(self, pid: int) -> None:
        """The process that is meant."""
        self._pid = pid
        self._known.set()

    def wake(self) -> None:
        """Let the client that was stopped go on, and its request take effect if it had not."""
        assert self._pid is not None
        with suppress(ProcessLookupError):  # others can wake it too, and by now it has learnt that it lost the job
            os.kill(self._pid, signal.SIGCONT)
        self._woken.set()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with self._one_at_a_time:
            number = len(self.requests)
            self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
            moment = self._armed[1] if self._armed and self._armed[0] == number else None
        if self.overwrites:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        if moment == "before":
            self._act()
        with self._one_at_a_time:
            answer = list(self._app(environ, start_response))
        if moment == "after":
            self._act()
        return answer

    def _act(self) -> None:
        assert self._armed is not None
        assert self._known.wait(_WAIT)
        assert self._pid is not None
        act = self._armed[2]
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL if act == "kill" else signal.SIGSTOP)
        if act == "sleep":
            self.asleep.set()
            self._woken.wait(_WAIT)
