"""A server in this process, on a socket of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from shoal.llm import LLM
from shoal.params import EngineConfig
from shoal.server.app import create_app
from shoal.server.service import Service
from shoal.server.settings import ServerSettings


@dataclass
class Running:
    """``url`` answers; ``service`` is what is behind it."""

    url: str
    service: Service
    client: httpx.Client

    def post(self, path: str, body: Any, **how: Any) -> httpx.Response:
        """A request without a limit of time: the machine may be busy. A body that names no model gets the one that there is."""
        if path.startswith("/v1/") and isinstance(body, dict):
            body = {"model": self.service.settings.served[0]} | body
        return self.client.post(self.url + path, json=body, **how)

    def get(self, path: str) -> httpx.Response:
        """The same."""
        return self.client.get(self.url + path)

    @property
    def llm(self) -> LLM:
        """The model that it serves."""
        return self.service.llm


@contextlib.contextmanager
def running(load: Callable[[], LLM], config: EngineConfig, **settings: Any) -> Iterator[Running]:
    """A server that has loaded its model (unless that fails), until the end of the block."""
    service = Service(load, ServerSettings(engine=config, served=settings.pop("served", ("tiny",)), **settings))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="error", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            service.worker.ready.wait()
            while not server.started:
                time.sleep(0.001)
            with httpx.Client(timeout=None, verify=False) as client:  # no TLS here, whose context takes long to make
                yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", service, client)
        finally:
            server.should_exit = True
            thread.join()
