"""The page over a real server: a tiny model that says noise."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from shoal.llm import LLM
from shoal.params import EngineConfig
from shoal.server.app import create_app
from shoal.server.routes import page as page_routes
from shoal.server.routes.status import page_state
from shoal.server.service import Service
from shoal.server.settings import ServerSettings
from tests.e2e.browsers import Opened, chromium, pane, set_prompts, wait_for_count, wait_for_state
from tests.support.tiny_model import write_tiny_model

pytestmark = pytest.mark.e2e

CONFIG = EngineConfig(device="reference", max_num_seqs=4, max_model_len=2048)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    path = write_tiny_model(tmp_path / "tiny.gguf", context=2048, layers=16)  # a step takes long enough to be seen
    service = Service(lambda: LLM(path, config=CONFIG), ServerSettings(engine=CONFIG, served=("tiny",)))
    routes = page_routes.routes(page_routes.page_folder(), functools.partial(page_state, service))
    app = create_app(service, routes)
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


def test_prompts_are_answered_and_seen_in_the_batch(address: str) -> None:
    with chromium() as browser:
        opened = Opened(browser, address)
        page = opened.page
        wait_for_state(page)
        set_prompts(page, "one", "two", "three")
        page.fill("#temperature", "0")  # it repeats itself and comes to no end
        page.fill("#max-tokens", "1500")
        page.click("#run")
        page.wait_for_selector(".slot[data-mine]")
        page.click("#stop")
        wait_for_count(page, ".slot[data-state=free]", 4)
        page.fill("#max-tokens", "8")
        page.click("#run")
        wait_for_count(page, ".pane[data-state=done]", 3)
        assert int(pane(page, 3).locator(".tokens").inner_text()) in range(1, 9)
        set_prompts(page, "x" * 4000, "two")
        page.click("#run")
        wait_for_count(page, ".pane[data-state=done]", 1)
        wait_for_count(page, ".pane[data-state=failed]", 1)
        assert "2048" in pane(page, 1).locator(".trouble").inner_text()
        assert [said for said in opened.complaints if "status of 400" not in said] == []
