"""The OpenAPI document: all routes and no others, and answers as it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
from starlette.routing import Route

from shoal.llm import LLM
from shoal.server.app import create_app
from shoal.server.openapi import OPERATIONS, document
from shoal.server.routes import batches, files, page
from shoal.server.service import Service
from shoal.server.settings import ServerSettings
from shoal.server.store.runner import BatchRunner
from shoal.server.store.store import Store
from tests.server.conftest import CONFIG
from tests.server.running import Running

CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
ANSWERS: list[tuple[str, str, Any]] = [
    ("POST", "/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1}),
    ("POST", "/v1/chat/completions", CHAT | {"return_token_ids": True, "n": 2}),
    ("POST", "/v1/chat/completions", CHAT | {"n": 17}),
    ("POST", "/v1/chat/completions", CHAT | {"model": "other"}),
    ("POST", "/v1/completions", {"prompt": ["a", "b"], "max_tokens": 3, "logprobs": 2, "echo": True}),
    ("POST", "/v1/embeddings", {"input": ["a", [65]]}),
    ("POST", "/v1/embeddings", {"input": "a", "encoding_format": "base64"}),
    ("POST", "/v1/responses", {"input": "x", "max_output_tokens": 3}),
    ("POST", "/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}),
    ("POST", "/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "x"}]}),
    ("POST", "/tokenize", {"prompt": "x", "return_token_strs": True}),
    ("POST", "/tokenize", {"messages": CHAT["messages"]}),
    ("POST", "/detokenize", {"tokens": [65]}),
    ("POST", "/detokenize", {"tokens": [-1]}),
    ("POST", "/apply-template", {"messages": CHAT["messages"]}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/{name}", "tiny"),
    ("GET", "/v1/models/{name}", "other"),
    ("GET", "/health", None),
    ("GET", "/live", None),
    ("GET", "/slots", None),
    ("GET", "/version", None),
    ("GET", "/openapi.json", None),
]


def test_it_has_every_route_and_no_other(tmp_path: Path) -> None:
    """But for the page and what that alone asks for."""
    store = Store(tmp_path / "data")
    service = Service(lambda: LLM(tmp_path / "none"), ServerSettings(engine=CONFIG, served=("tiny",)))
    more = [
        *files.routes(store.files),
        *batches.routes(store, BatchRunner(store)),
        *page.routes(page.page_folder(), dict),
    ]
    routes = [route for route in create_app(service, more).routes if isinstance(route, Route)]
    store.close()
    own = (page.HOME, page.STATE, page.ASSETS + "{name}")
    there = {
        (method, route.path_format)
        for route in routes
        for method in (route.methods or set()) - {"HEAD"}
        if route.path_format not in own
    }
    assert there == OPERATIONS.keys()


@pytest.mark.parametrize(("method", "path", "asked"), ANSWERS)
def test_answers_are_as_it_says(server: Running, method: str, path: str, asked: Any) -> None:
    answer = server.post(path, asked) if method == "POST" else server.get(path.replace("{name}", asked or ""))
    described = document()
    responses = described["paths"][path][method.lower()]["responses"]
    schema = responses[str(answer.status_code)]["content"]["application/json"]["schema"]
    jsonschema.validate(
        answer.json(), schema | {"components": described["components"]}, jsonschema.Draft202012Validator
    )


def test_its_schemas_are_schemas_and_all_are_there() -> None:
    described = document()
    schemas = described["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert set(_references(described)) <= {f"#/components/schemas/{name}" for name in schemas}
    ids = [operation["operationId"] for methods in described["paths"].values() for operation in methods.values()]
    assert len(set(ids)) == len(OPERATIONS)
    assert described["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert schemas["ChatBody"]["required"] == ["model", "messages"]
    assert "stream" in schemas["ChatBody"]["properties"]


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [found for item in value.values() for found in _references(item)]
    return [found for item in value for found in _references(item)] if isinstance(value, list) else []
