"""The shape of /page/state, which the page's scripts read and docs/server.md tells."""

from __future__ import annotations

from typing import Any

import jsonschema

_COUNT = {"type": "integer", "minimum": 0}
_AMOUNT = {"type": "number", "minimum": 0}
_MAYBE = {"type": ["number", "null"], "minimum": 0}
_TEXT = {"type": "string"}


def _record(**fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


_QUANTILES = _record(p50=_MAYBE, p95=_MAYBE)
_SLOT = _record(
    id=_TEXT,
    state={"enum": ["prefill", "decode", "waiting", "preempted"]},
    prompt_tokens=_COUNT,
    computed_tokens=_COUNT,
    output_tokens=_COUNT,
    max_tokens={"type": ["integer", "null"], "minimum": 0},
    age_seconds=_AMOUNT,
    rows=_COUNT,
    owner=_TEXT,
)
_BATCH = _record(id=_TEXT, status=_TEXT, completed=_COUNT, failed=_COUNT, total=_COUNT, created_at=_COUNT)
_WHOLE = _record(
    model=_TEXT,
    version=_TEXT,
    health={"enum": ["ok", "loading", "draining", "wedged", "failed"]},
    uptime_seconds=_AMOUNT,
    step=_record(number=_COUNT, seconds=_AMOUNT, rows=_COUNT, target_seconds=_MAYBE),
    slots={"type": "array", "items": _SLOT},
    max_num_seqs=_COUNT,
    running=_COUNT,
    waiting=_COUNT,
    waiting_tokens=_COUNT,
    kv_pages=_record(used=_COUNT, total=_COUNT),
    preemptions=_COUNT,
    totals=_record(
        prompt_tokens=_COUNT,
        cached_tokens=_COUNT,
        generation_tokens=_COUNT,
        requests=_record(stop=_COUNT, length=_COUNT, abort=_COUNT, error=_COUNT, timeout=_COUNT),
    ),
    latency=_record(ttft=_QUANTILES, itl=_QUANTILES, e2e=_QUANTILES, queue=_QUANTILES),
    history={
        "type": "array",
        "maxItems": 120,
        "items": {"type": "array", "items": _AMOUNT, "minItems": 7, "maxItems": 7},
    },
    batches={"type": "array", "items": _BATCH},
)


_FROM_THE_ENGINE = {
    "step",
    "running",
    "waiting",
    "kv_pages",
    "preemptions",
    "totals",
}  # absent while a model is being loaded
_STATE = _WHOLE | {"required": [name for name in _WHOLE["required"] if name not in _FROM_THE_ENGINE]}


def check_state(state: Any) -> None:
    """Raises jsonschema.ValidationError that says which field is not as the page needs it."""
    jsonschema.validate(state, _STATE)
