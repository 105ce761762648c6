"""Takes the picture of the page that the docs have: `python -m tests.e2e.screenshot` writes docs/images/dashboard.png."""

from __future__ import annotations

import io
import re
from pathlib import Path

from PIL import Image

from tests.e2e.browsers import Opened, chromium, wait_for_state, wait_for_text
from tests.server.page.fake_engine import FakeEngine
from tests.server.page.fake_server import FakeServer, serving

TARGET = Path(__file__).parents[2] / "docs" / "images" / "dashboard.png"
WANTED = (".slot[data-state=prefill]", ".slot[data-state=decode]", ".chips li", ".pane[data-state=streaming] .reply")
MOST_COLOURS = 200  # what a picture without photographs needs; a fifth of the size


def main() -> None:
    engine = FakeEngine()
    engine.now -= 120
    engine.run(120)
    with serving(FakeServer(engine)) as address, chromium() as browser:
        opened = Opened(browser, address, color_scheme="light")
        page = opened.page
        wait_for_state(page)
        page.fill("#max-tokens", "640")
        page.click("#run")
        wait_for_text(page, ".pane:last-child .tokens", re.compile(r"[6-9]\d|\d{3}"))
        for selector in WANTED:
            page.locator(selector).first.wait_for()
        taken = Image.open(io.BytesIO(page.screenshot(full_page=True)))
        taken.convert("RGB").quantize(MOST_COLOURS, dither=Image.Dither.NONE).save(TARGET, optimize=True)
        print(f"{TARGET}: {TARGET.stat().st_size // 1024} kB")


if __name__ == "__main__":
    main()
