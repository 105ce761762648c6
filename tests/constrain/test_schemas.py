"""JSON schemas of many kinds: each compiles and what is written under it is valid, or it is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.constrain.compiler import ConstraintCompiler
from shoal.errors import ParameterError
from shoal.params import StructuredOutputsParams
from shoal.text.tokenizer import Tokenizer
from tests.constrain.walks import validate, walk

_LINES = Path(__file__).with_name("schemas.jsonl").read_text(encoding="utf-8").splitlines()
SCHEMAS: list[dict[str, Any]] = [json.loads(line) for line in _LINES]
KINDS = sorted({entry["kind"] for entry in SCHEMAS})
# No text of 400 tokens, or only one that luck would have to find, follows these.
ENDLESS = {"deep", "fifty required", "too deep", "many digits", "long text"}


def text_of(schema: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(json=json.dumps(schema))


def test_there_are_many() -> None:
    assert len(SCHEMAS) >= 200
    assert sum("refused" not in entry for entry in SCHEMAS) >= 160


@pytest.mark.parametrize("entry", [entry for entry in SCHEMAS if "refused" in entry], ids=lambda entry: entry["name"])
def test_what_cannot_be_enforced_is_refused_by_name(entry: dict[str, Any], compiler: ConstraintCompiler) -> None:
    with pytest.raises(ParameterError) as refused:
        compiler.compile(text_of(entry["schema"]))
    assert entry["refused"] in str(refused.value)
    assert refused.value.field == "structured_outputs.json"
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_under_a_schema_is_valid(kind: str, compiler: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    for number, entry in enumerate(SCHEMAS):
        if entry["kind"] != kind or "refused" in entry:
            continue
        constraint, rng = compiler.compile(text_of(entry["schema"])), np.random.default_rng(number)
        texts = [walk(constraint.copy(), tokenizer, rng, 400) for _ in range(4)]
        ended = [text for text in texts if text is not None]
        assert ended or entry["name"] in ENDLESS, entry["name"]
        for text in ended:
            validate(text, entry["schema"])
