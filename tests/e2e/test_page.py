"""The page in a real browser, over an invented engine."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.browsers import Opened, chromium, pane, set_prompts, wait_for_count, wait_for_state, wait_for_text
from tests.server.page.fake_engine import FakeEngine
from tests.server.page.fake_server import KEY, FakeServer, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.e2e

PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def lively_engine(**options: Any) -> FakeEngine:
    """One that has run for two minutes."""
    engine = FakeEngine(**options)
    engine.now -= 120
    engine.run(120)
    return engine


@pytest.fixture
def server() -> FakeServer:
    return FakeServer(lively_engine())


@pytest.fixture
def address(server: FakeServer) -> Iterator[str]:
    with serving(server) as address:
        yield address


@pytest.fixture
def opened(browser: Browser, address: str) -> Iterator[Opened]:
    opened = Opened(browser, address)
    wait_for_state(opened.page)
    yield opened
    opened.context.close()


# What it shows --------------------------------------------------------------------------------------------------------


def test_it_shows_what_the_server_does_and_asks_nobody_else(opened: Opened, address: str) -> None:
    page = opened.page
    page.wait_for_selector(".slot:not([data-state=free])")
    assert page.inner_text("#model") == "smollm2:135m"
    assert page.locator(".slot").count() == 16
    assert page.locator("canvas").count() == 4
    assert re.match(r"\d", page.inner_text("#generation-rate"))
    assert page.locator("#latency tr").count() == 4
    assert page.locator("#batches progress").count() == 2
    assert re.search(r"Step [\d,]+: \d+ rows? of \d+ sequence", page.inner_text("#step-words"))
    assert opened.complaints == []
    assert all(url.startswith(address) for url in opened.asked)


def test_it_follows_the_server_once_a_second(opened: Opened) -> None:
    page = opened.page
    before = page.inner_text("#step-words strong")
    wait_for_text(page, "#step-words strong", re.compile(rf"(?!{before}$)Step "))


# What stands in each slot after each of the next five times that the page is told of a step.
_FIVE_LOOKS = """() => new Promise(resolve => {
  const looks = [];
  const watcher = new MutationObserver(() => setTimeout(() => {
    looks.push([...document.querySelectorAll(".slot")].map(slot => slot.dataset.id ?? ""));
    if (looks.length === 5) { watcher.disconnect(); resolve(looks); }
  }, 0));
  watcher.observe(document.querySelector("#step-words"), { childList: true, characterData: true, subtree: true });
})"""


def test_a_sequence_keeps_its_slot(opened: Opened) -> None:
    """One that is there in two looks in a row; one that was preempted between may come back elsewhere."""
    looks = opened.page.evaluate(_FIVE_LOOKS)
    kept = 0
    for before, after in itertools.pairwise(looks):
        for name in set(before) & set(after) - {""}:
            assert before.index(name) == after.index(name)
            kept += 1
    assert kept


def test_many_slots_are_small_squares_that_still_say_what_they_are(browser: Browser) -> None:
    with serving(FakeServer(lively_engine(max_num_seqs=64, total_pages=9_000))) as address:
        opened = Opened(browser, address, viewport=PHONE)
        wait_for_count(opened.page, ".dense .slot", 64)
        label = opened.page.locator(".slot[data-state=decode]").first.get_attribute("aria-label")
        assert re.match(r"decode, \d+ tokens? of \d+, \w+, chatcmpl-", label or "")
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert opened.complaints == []
        opened.context.close()


def test_a_server_that_has_only_begun_is_shown_too(browser: Browser) -> None:
    with serving(FakeServer(FakeEngine(arrivals_per_second=0, health="loading"))) as address:
        opened = Opened(browser, address)
        opened.page.wait_for_selector("#health[data-health=loading]")
        wait_for_text(opened.page, "#waiting", "0")
        assert opened.page.locator(".slot[data-state=free]").count() == 16
        assert opened.complaints == []
        opened.context.close()


def test_a_server_that_went_away_is_said_and_found_again(browser: Browser, server: FakeServer) -> None:
    with serving(server) as address:
        opened = Opened(browser, address)
        wait_for_state(opened.page)
    opened.page.wait_for_selector("#banner:not([hidden])")
    assert "does not answer" in opened.page.inner_text("#banner")
    with serving(server, port=int(address.rstrip("/").rsplit(":", 1)[1])):
        wait_for_state(opened.page)
        assert opened.page.is_hidden("#banner")
    opened.context.close()


# How it looks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_in_both_themes(browser: Browser, scheme: str) -> None:
    """At least 4.5:1 (WCAG 2 AA) between all text and what is behind it, sequences in every state among it."""
    engine = FakeEngine(now=1e9, total_pages=200)
    while {sequence.state for sequence in engine.sequences} < {"prefill", "decode", "waiting", "preempted"}:
        engine.step()
    with serving(FakeServer(engine, moves=False)) as address:
        opened = Opened(browser, address, color_scheme=scheme, reduced_motion="reduce")
        wait_for_state(opened.page)
        assert opened.page.locator("[data-state=preempted]").count() > 0
        assert opened.page.evaluate(CONTRAST) == []
        opened.context.close()


def test_the_theme_is_the_systems_until_one_is_chosen(browser: Browser, address: str) -> None:
    opened = Opened(browser, address, color_scheme="dark")
    page = opened.page
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.click("#theme-button")
    assert page.get_attribute("#theme-button", "aria-label") == "Theme: light"
    light = page.evaluate(ground)
    assert light != dark
    page.reload()
    wait_for_state(page)
    assert page.evaluate(ground) == light
    assert opened.complaints == []
    opened.context.close()


@pytest.mark.parametrize("width", [320, 360, 768, 1024, 1920])
def test_nothing_is_wider_than_the_window(browser: Browser, address: str, width: int) -> None:
    opened = Opened(browser, address, viewport={"width": width, "height": 740})
    wait_for_state(opened.page)
    set_prompts(opened.page, "a" * 400, "x")
    opened.page.click("#run")
    opened.page.wait_for_selector(".pane[data-state=streaming]")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    opened.context.close()


def test_who_wants_no_motion_gets_none(browser: Browser, address: str) -> None:
    opened = Opened(browser, address, reduced_motion="reduce")
    wait_for_state(opened.page)
    moving = "[...document.querySelectorAll('*')].filter(e => !/^0s(, 0s)*$/.test(getComputedStyle(e).transitionDuration)).length"
    assert opened.page.evaluate(moving) == 0
    opened.context.close()


# By keyboard, and for who cannot see it -------------------------------------------------------------------------------


def test_everything_is_reached_in_order_by_the_tab_key_and_shows_it(opened: Opened) -> None:
    page = opened.page
    page.select_option("#count", "2")
    reached = []
    page.evaluate("document.activeElement.blur()")
    for _ in range(40):
        page.keyboard.press("Tab")
        here = page.evaluate(FOCUSED)
        if here["name"] == "body":
            break
        assert here["outlined"], here
        reached.append(here["name"])
    assert reached == [
        *("Skip to the playground", "theme-button", "count", "max-tokens", "temperature", "seed", "run"),
        *("prompt-1", "Answer 1", "prompt-2", "Answer 2"),
        *("uPlot", "Metrics", "OpenAPI", "Health"),
    ]


def test_the_skip_link_leads_to_the_playground(opened: Opened) -> None:
    opened.page.keyboard.press("Tab")
    opened.page.keyboard.press("Enter")
    assert opened.page.evaluate("document.activeElement.id") == "playground"


def test_everything_has_a_name(opened: Opened) -> None:
    """Controls and pictures for who hears the page; ids are there once; headings skip no level."""
    assert opened.page.evaluate(UNNAMED) == []
    levels = opened.page.eval_on_selector_all(
        "h1, h2, h3", "all => all.filter(e => e.offsetParent).map(e => Number(e.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    ids = opened.page.eval_on_selector_all("[id]", "all => all.map(e => e.id)")
    assert len(ids) == len(set(ids))


# The key --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def locked(browser: Browser) -> Iterator[Opened]:
    with serving(FakeServer(lively_engine(), key=KEY)) as address:
        opened = Opened(browser, address)
        opened.page.wait_for_selector("dialog[open]")
        yield opened
        opened.context.close()


def test_the_key_is_asked_for_kept_in_the_tab_and_sent(locked: Opened) -> None:
    page = locked.page
    assert page.evaluate("document.activeElement.id") == "key-input"
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    wait_for_state(page)
    assert page.is_hidden("dialog")
    page.reload()
    wait_for_state(page)
    assert page.evaluate("Object.keys(localStorage).length") == 0
    assert not any(KEY in url for url in locked.asked)
    page.click("#run")
    page.wait_for_selector(".pane[data-state=streaming]")


def test_a_wrong_key_is_asked_for_again(locked: Opened) -> None:
    page = locked.page
    page.fill("#key-input", "whale")
    page.keyboard.press("Enter")
    wait_for_text(page, "#key-why", re.compile("not one of its keys"))
    page.wait_for_selector("dialog[open]")
    page.fill("#key-input", KEY)
    page.keyboard.press("Enter")
    wait_for_state(page)


def test_the_dialog_can_be_put_off(locked: Opened) -> None:
    page = locked.page
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog:not([open])", state="attached")
    assert page.inner_text("#health-text") == "key needed"
    page.click("#key-button")
    page.fill("#key-input", KEY)
    page.keyboard.press("Enter")
    wait_for_state(page)


# The playground -------------------------------------------------------------------------------------------------------


def test_prompts_start_together_and_stream_side_by_side(opened: Opened, server: FakeServer) -> None:
    page = opened.page
    set_prompts(page, "one", "two", "three")
    page.fill("#max-tokens", "40")
    page.fill("#temperature", "0.25")
    page.fill("#seed", "11")
    page.focus("#prompt-2")
    page.keyboard.press("Control+Enter")
    wait_for_count(page, ".pane[data-state=streaming]", 3)
    wait_for_count(page, ".pane[data-state=done]", 3)
    assert sorted(body["messages"][0]["content"] for body in server.bodies) == ["one", "three", "two"]
    for body in server.bodies:
        sampling = {name: body[name] for name in ("max_tokens", "temperature", "seed", "stream", "stream_options")}
        assert sampling == {
            "max_tokens": 40,
            "temperature": 0.25,
            "seed": 11,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    for number in (1, 2, 3):
        assert pane(page, number).locator(".reply").inner_text().startswith("A shoal moves as one")
        assert pane(page, number).locator(".tokens").inner_text() == "40"
        assert re.fullmatch(r"[\d.,]+ tok/s", pane(page, number).locator(".rate").inner_text())
        assert re.fullmatch(r"[\d.,]+ m?s", pane(page, number).locator(".ttft").inner_text())
    assert re.fullmatch(r"3 streams, [\d.,]+ tok/s together", page.inner_text("#together"))
    assert page.inner_text("#playground-status") == "All answers have come"
    assert opened.complaints == []


def test_ones_own_requests_are_seen_in_the_batch(opened: Opened) -> None:
    page = opened.page
    set_prompts(page, "one", "two")
    page.fill("#max-tokens", "400")
    page.click("#run")
    page.wait_for_selector(".slot[data-mine='1'], .chips [data-mine='1']")
    page.wait_for_selector(".slot[data-mine='2'], .chips [data-mine='2']")


def test_without_a_seed_none_is_sent(opened: Opened, server: FakeServer) -> None:
    opened.page.click("#run")
    opened.page.wait_for_selector(".pane[data-state=streaming]")
    assert server.bodies
    assert "seed" not in server.bodies[0]


def test_stop_aborts_what_is_running(opened: Opened, server: FakeServer) -> None:
    page = opened.page
    set_prompts(page, "one", "two")
    page.fill("#max-tokens", "5000")
    page.click("#run")
    wait_for_count(page, ".pane[data-state=streaming]", 2)
    page.click("#stop")
    wait_for_count(page, ".pane[data-state=stopped]", 2)
    page.wait_for_timeout(500)
    assert not any(sequence.owner == "you" for sequence in server.engine.sequences)
    assert server.engine.requests["abort"] == 2
    assert page.evaluate("document.activeElement.id") == "run"
    assert pane(page, 1).locator(".reply").inner_text()


def test_an_error_stays_in_its_pane(browser: Browser, address: str) -> None:
    opened = Opened(browser, address)
    page = opened.page
    wait_for_state(page)
    set_prompts(page, "refuse", "break", "well")
    page.fill("#max-tokens", "30")
    page.click("#run")
    wait_for_text(page, "#playground-status", "2 answers failed")
    assert "is refused, as it asks to be" in pane(page, 1).locator(".trouble").inner_text()
    assert pane(page, 2).locator(".trouble").inner_text() == "a step failed"
    assert pane(page, 2).locator(".reply").inner_text()
    assert pane(page, 3).locator(".pane-state").inner_text() == "at its limit"
    page.fill("#prompt-1", "well")
    page.click("#run")
    page.wait_for_selector(".pane:first-child[data-state=done]")
    assert pane(page, 1).locator(".trouble").is_hidden()
    opened.context.close()


def test_thoughts_are_folded_away(opened: Opened) -> None:
    page = opened.page
    set_prompts(page, "think", "well")
    page.fill("#max-tokens", "30")
    page.click("#run")
    wait_for_count(page, ".pane[data-state=done]", 2)
    thought = pane(page, 1).locator(".thought")
    assert thought.is_visible()
    assert not pane(page, 1).locator(".thought-text").is_visible()
    thought.locator("summary").press("Enter")
    assert pane(page, 1).locator(".thought-text").inner_text().startswith("A shoal")
    assert pane(page, 2).locator(".thought").is_hidden()


def test_as_many_prompts_as_there_are_connections_leave_one_for_the_page(opened: Opened) -> None:
    """Browsers open six to a server: all streams run at once, and the page still follows."""
    page = opened.page
    most = page.locator("#count option").count() + 1
    set_prompts(page, *["well"] * most)
    page.fill("#max-tokens", "5000")
    page.click("#run")
    wait_for_count(page, ".pane[data-state=streaming]", most)
    before = page.inner_text("#step-words strong")
    wait_for_text(page, "#step-words strong", re.compile(rf"(?!{before}$)Step "))
    page.click("#stop")
    wait_for_count(page, ".pane[data-state=stopped]", most)
    page.select_option("#count", "2")
    assert page.locator(".pane").count() == 2


# In the browser -------------------------------------------------------------------------------------------------------

FOCUSED = """() => {
  const e = document.activeElement;
  const style = getComputedStyle(e);
  return {
    name: e === document.body ? "body" : e.id || e.getAttribute("aria-label") || e.textContent.trim(),
    outlined: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
  };
}"""

UNNAMED = """() => {
  const spoken = (e) =>
    e.getAttribute("aria-label") ||
    (e.getAttribute("aria-labelledby") && document.getElementById(e.getAttribute("aria-labelledby")).textContent.trim()) ||
    (e.labels && [...e.labels].map((label) => label.textContent.trim()).join("")) ||
    (e.matches("button, a, summary") && e.textContent.trim());
  const named = "button, a[href], input, select, textarea, summary, progress, dialog, section, [role=img], [role=meter], [role=group]";
  const silent = [...document.querySelectorAll(named)].filter((e) => !spoken(e));
  const images = [...document.querySelectorAll("img:not([alt]), svg:not([aria-hidden]), canvas")];
  const pictures = images.filter((e) => !e.closest("[aria-hidden=true]"));
  return [...silent, ...pictures].map((e) => e.outerHTML.slice(0, 120));
}"""

CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const parse = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ground = (e) => {
    const layers = [];
    for (let at = e; at; at = at.parentElement) {
      const fill = at.querySelector(":scope > .slot-fill"); // drawn behind the words of a slot
      if (fill && getComputedStyle(fill).display !== "none") layers.push(parse(getComputedStyle(fill).backgroundColor));
      layers.push(parse(getComputedStyle(at).backgroundColor));
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const poor = new Set();
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const e = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !e.checkVisibility() || e.closest(".unseen, :disabled, script, noscript, .skip")) continue;
    const behind = ground(e);
    const [a, b] = [light(over(parse(getComputedStyle(e).color), behind)), light(behind)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) poor.add(`${ratio.toFixed(2)} ${e.className || e.tagName}: ${e.textContent.slice(0, 30)}`);
  }
  return [...poor];
}"""
