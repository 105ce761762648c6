"""The page's files: what they ask for, what they are served with, and that they fit together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources.abc import Traversable

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from shoal.server.routes.page import ASSETS, MEDIA_TYPES, page_folder, routes
from tests.server.page.fake_engine import FakeEngine
from tests.server.page.shape import check_state

OTHER_ROUTES = {"metrics", "openapi.json", "health"}  # the page links to them
SVG_NAMESPACE = "http://www.w3.org/2000/svg"


def page_files(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from page_files(entry, f"{prefix}{entry.name}/")
        else:
            yield prefix + entry.name, entry


FILES = {name: entry.read_text(encoding="utf-8") for name, entry in page_files(page_folder())}
OWN = {name: text for name, text in FILES.items() if not name.startswith("vendor/")}
SCRIPTS = {name: text for name, text in OWN.items() if name.endswith(".js")}


class Tags(HTMLParser):
    """Every start tag of a document."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


TAGS = Tags(FILES["index.html"]).found


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(Starlette(routes=list(routes(page_folder(), FakeEngine().state))), base_url="http://127.0.0.1")


@pytest.mark.parametrize("name", FILES)
def test_each_file_is_served_with_its_type_and_no_way_out(client: TestClient, name: str) -> None:
    answer = client.get("/" if name == "index.html" else ASSETS + name)
    assert answer.status_code == 200
    assert answer.text == FILES[name]
    assert answer.headers["content-type"] == MEDIA_TYPES[name[name.rfind(".") :]]
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_file_that_is_known_is_not_sent_again(client: TestClient) -> None:
    first = client.get(ASSETS + "app.js")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get(ASSETS + "app.js", headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert client.get(ASSETS + "app.js", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "name", ["nothing.js", "%2e%2e/routes/page.py", "..%2f..%2fapp.py", "%2fetc%2fpasswd", "", "vendor"]
)
def test_no_other_file_is_reached(client: TestClient, name: str) -> None:
    answer = client.get(ASSETS + name)
    assert answer.status_code == 404
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_is_only_read(client: TestClient) -> None:
    assert client.post("/").status_code == 405
    assert client.head("/").status_code == 200


def test_the_state_is_fresh_and_of_the_shape_that_is_told(client: TestClient) -> None:
    answer = client.get("/page/state")
    assert answer.headers["cache-control"] == "no-store"
    check_state(answer.json())


def test_an_invented_engine_has_every_state_of_a_sequence() -> None:
    engine = FakeEngine(total_pages=200, now=1e9)
    states = set()
    for _ in range(60):
        engine.run(1)
        state = engine.state()
        check_state(state)
        states |= {slot["state"] for slot in state["slots"]}
    assert states == {"prefill", "decode", "waiting", "preempted"}


@pytest.mark.parametrize("name", OWN)
def test_nothing_comes_from_elsewhere(name: str) -> None:
    text = FILES[name].replace(SVG_NAMESPACE, "")
    assert (
        re.findall(r"(?:https?:|wss?:|[\"'(=\s])//[\w.]+", re.sub(r"^\s*//.*$|\s// .*$", "", text, flags=re.MULTILINE))
        == []
    )


def test_the_vendored_charts_fetch_nothing_and_come_with_their_licence() -> None:
    script = FILES["vendor/uPlot.js"]
    assert (
        re.findall(r"\b(?:fetch|XMLHttpRequest|WebSocket|importScripts|eval|Function)\(|\bimport\b|\.src\s*=", script)
        == []
    )
    assert "url(" not in FILES["vendor/uPlot.css"]
    assert "MIT License" in script
    assert "Permission is hereby granted" in FILES["vendor/uPlot.LICENSE.txt"]


def test_nothing_is_inline() -> None:
    for tag, attributes in TAGS:
        assert tag != "style"
        assert tag != "script" or attributes.get("src"), attributes
        assert not any(name == "style" or name.startswith("on") for name in attributes), (tag, attributes)


@pytest.mark.parametrize("name", SCRIPTS)
def test_text_never_becomes_markup(name: str) -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(|new Function|setAttribute\(\"style|srcdoc"
    assert re.findall(forbidden, SCRIPTS[name]) == []


def test_every_address_in_the_document_is_answered() -> None:
    for tag, attributes in TAGS:
        for address in (attributes.get("href"), attributes.get("src")):
            if address is None or address.startswith("#"):
                continue
            assert not address.startswith("/"), f"{tag} {address}: does not work below a prefix"
            assert address in OTHER_ROUTES or address.removeprefix(ASSETS[1:]) in FILES, f"{tag} {address}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_import_resolves(name: str) -> None:
    for what, source in re.findall(r"import (.+?) from \"(.+?)\";", SCRIPTS[name]):
        assert source.startswith("./")
        target = FILES[source[2:]]
        names = [part.strip() for part in what.strip("{} ").split(",")] if "{" in what else ["default"]
        for imported in names:
            exported = rf"export (?:async )?(?:function\*?|class|const) {imported}\b|export {{.* as {imported}\b"
            assert re.search(exported, target), f"{imported} is not in {source}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_element_that_a_script_names_is_there(name: str) -> None:
    ids = {attributes["id"] for _, attributes in TAGS if "id" in attributes}
    named = re.findall(r"(?:byId|getElementById)\(\"([\w-]+)\"\)|\bid: \"([\w-]+)\"", SCRIPTS[name])
    assert {a or b for a, b in named} <= ids


def test_ids_are_given_once_and_references_to_them_hold() -> None:
    ids = [attributes["id"] for _, attributes in TAGS if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in TAGS:
        for reference in (attributes.get("aria-labelledby"), attributes.get("for")):
            assert reference is None or reference in ids
