"""What a real server tells the page."""

from __future__ import annotations

from shoal.server.routes.status import page_state
from shoal.server.service import Service
from shoal.server.settings import ServerSettings
from tests.server.conftest import CONFIG
from tests.server.page.shape import check_state
from tests.server.running import Running


def test_a_server_tells_all_that_the_page_reads(server: Running) -> None:
    body = {"prompt": "abc", "max_tokens": 8, "ignore_eos": True}
    assert server.post("/v1/completions", body).status_code == 200
    state = page_state(server.service)
    check_state(state)
    assert state["totals"]["generation_tokens"] >= 8
    assert state["latency"]["e2e"]["p50"] > 0
    assert "step" in state


def test_a_server_that_loads_tells_what_it_can() -> None:
    def load() -> None:
        raise AssertionError("never started")

    service = Service(load, ServerSettings(engine=CONFIG, served=("tiny",)))  # type: ignore[arg-type]
    state = page_state(service)
    check_state(state)
    assert state["health"] == "loading"
    assert "step" not in state
