"""Chromium as Debian has it, and pages that remember what went wrong in them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDE = {"width": 1280, "height": 900}
_PATIENCE = 20_000  # ms


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless one; skips the test where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium on PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A page, with all that its console and its network said."""

    def __init__(self, browser: Browser, address: str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": WIDE, **options})
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(_PATIENCE)
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)


# Playwright's wait_for_function evaluates text in the page, which its Content-Security-Policy forbids: these ask from outside.


def wait_for_count(page: Page, selector: str, count: int) -> None:
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_count(count, timeout=_PATIENCE)


def wait_for_text(page: Page, selector: str, text: str | re.Pattern[str]) -> None:
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_text(text, timeout=_PATIENCE)


def wait_for_state(page: Page) -> None:
    page.wait_for_selector("#health[data-health=ok]")


def set_prompts(page: Page, *prompts: str) -> None:
    page.select_option("#count", str(len(prompts)))
    for number, prompt in enumerate(prompts, 1):
        page.fill(f"#prompt-{number}", prompt)


def pane(page: Page, number: int) -> Any:
    return page.locator(".pane").nth(number - 1)
