"""What a driver does about a cluster that is not there, or not any more."""

from __future__ import annotations

import socket

import pytest

from shoal.errors import EngineError, JobError
from shoal.ray import connection
from shoal.ray.connection import End, Lifeline, connected


def test_a_cluster_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(JobError, match=f"the Ray cluster {address} cannot be reached"), connected(address, print):
        pass


def test_what_answers_no_more_for_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_SECONDS_BETWEEN_LOOKS", 0)
    with socket.create_server(("127.0.0.1", 0)) as head, socket.create_server(("127.0.0.1", 0)) as node:
        patient = End("127.0.0.1", head.getsockname()[1], patience=600)
        impatient = End("127.0.0.1", node.getsockname()[1], patience=0)
        lifeline = Lifeline({"the head": patient, "the node": impatient})
        lifeline.look()
        head.close()
        lifeline.look()
        node.close()
        with pytest.raises(EngineError, match=f"the node .127.0.0.1:{impatient.port}. cannot be reached"):
            lifeline.look()
