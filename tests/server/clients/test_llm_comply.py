"""llm-comply: answers of all three APIs held against their specifications."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.server.clients.conftest import Served

pytest.importorskip("llm_comply", reason="llm-comply is not installed: pip install '.[clients]'")

import llm_comply
from llm_comply.config import ComplianceConfig
from llm_comply.http import close_client
from llm_comply.runner import TestRunner as Runner
from llm_comply.schema import SpecLoader
from llm_comply.tests import get_tests

SPECIFICATIONS = {
    "openai-chat": "openai_chat.json",
    "open-responses": "openresponses.json",
    "anthropic": "anthropic.json",
}
IMAGES = ("chat-image-input", "image-input", "anth-image-input")  # refused: models read text alone
ANTHROPIC = {"auth_header": "x-api-key", "use_bearer_prefix": False}


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_client()


@pytest.mark.filterwarnings("ignore:jsonschema.RefResolver is deprecated:DeprecationWarning")  # in llm-comply
@pytest.mark.parametrize(
    ("form", "case"),
    [
        pytest.param(form, case, id=case.id)
        for form in SPECIFICATIONS
        for case in get_tests(form)
        if case.id not in IMAGES
    ],
)
def test_the_form_is_right(smollm2: Served, form: str, case: Any) -> None:
    """Greedily, so that the model ends its answer each time."""
    specification = SpecLoader(str(Path(llm_comply.__file__).parent / "specs" / SPECIFICATIONS[form]))
    own: dict[str, Any] = ANTHROPIC if form == "anthropic" else {}
    config = ComplianceConfig(f"{smollm2.url}/v1", smollm2.key, smollm2.model, timeout=600, **own)
    greedy = replace(case, build_request=lambda config: case.build_request(config) | {"temperature": 0})
    result = Runner(config, [greedy], specification).run_one(greedy)
    if result.status.value == "skipped":
        pytest.skip(result.errors[0])
    assert result.errors == []
