"""Schemathesis over our own OpenAPI document: whatever a body holds, the server answers, in the form that it promises."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from shoal.server.openapi import document
from tests.server.clients.conftest import Served

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install '.[clients]'")

from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
SCHEMA = schemathesis.openapi.from_dict(document())


@SCHEMA.parametrize()  # type: ignore[untyped-decorator]
@settings(
    max_examples=10,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_operation_answers(case: Any, tiny: Served) -> None:
    response = case.call(base_url=tiny.url, headers={"authorization": f"Bearer {tiny.key}"})
    case.validate_response(response, checks=CHECKS)
