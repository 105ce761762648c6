"""What constraints cost: seconds of a decoding step with all rows free, all under one schema, and each under a schema of its own."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

from shoal.bench.workload import Prompt, random_prompts
from shoal.errors import RequestError
from shoal.llm import LLM
from shoal.params import SamplingParams, StructuredOutputsParams

_NAMES = ("name", "city", "title", "email", "country", "product", "comment", "status")


@dataclass(frozen=True, slots=True)
class ConstraintResult:
    """Median seconds of a step of each kind, one for each round; the rounds took turns."""

    rows: int
    free: list[float]
    one_schema: list[float]
    own_schemas: list[float]

    def slower(self, constrained: list[float]) -> float:
        """How much longer a step takes than a free one, as a share: the median over the rounds."""
        return median(bound / free for bound, free in zip(constrained, self.free, strict=True)) - 1

    def as_json(self) -> dict[str, Any]:
        """Seconds of a step, and by how much constrained ones are slower."""
        return {
            "rows": self.rows,
            "free_step_seconds": median(self.free),
            "one_schema_step_seconds": median(self.one_schema),
            "own_schemas_step_seconds": median(self.own_schemas),
            "one_schema_slower": self.slower(self.one_schema),
            "own_schemas_slower": self.slower(self.own_schemas),
        }

    def __str__(self) -> str:
        kinds = (("under one schema", self.one_schema), ("each under its own", self.own_schemas))
        lines = [f"{self.rows} free rows: {1000 * median(self.free):.2f} ms a step"]
        lines += [
            f"{self.rows} rows {name}: {1000 * median(times):.2f} ms a step, {self.slower(times):+.1%}"
            for name, times in kinds
        ]
        return "\n".join(lines)


def measure_constraints(llm: LLM, *, rows: int, steps: int, rounds: int) -> ConstraintResult:
    """Time ``steps`` decoding steps of ``rows`` greedy rows, of each kind in turn, ``rounds`` times, after one to warm up."""
    prompts = random_prompts(llm, rows, 16)
    one, own = [schema(0)] * rows, [schema(number) for number in range(rows)]
    kinds: list[list[StructuredOutputsParams | None]] = [[None] * rows, [*one], [*own]]
    times = [[_step_seconds(llm, prompts, kind, steps) for kind in kinds] for _ in range(rounds + 1)][1:]
    free, under_one, under_own = ([turn[kind] for turn in times] for kind in range(3))
    return ConstraintResult(rows, free, under_one, under_own)


def schema(number: int) -> StructuredOutputsParams:
    """A list of records, long enough for any measurement; each number has other names, choices and bounds."""
    texts = {f"{_NAMES[(number + i) % len(_NAMES)]}_{number}": {"type": "string"} for i in range(3)}
    record = {
        **texts,
        "count": {"type": "integer", "minimum": 0, "maximum": 1000 + number},
        "kind": {"enum": [f"kind {number} {letter}" for letter in "abcd"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
    }
    items = {"type": "object", "properties": record, "required": [*record], "additionalProperties": False}
    return StructuredOutputsParams(json={"type": "array", "items": items, "minItems": 1000})


def _step_seconds(
    llm: LLM, prompts: list[Prompt], constraints: list[StructuredOutputsParams | None], steps: int
) -> float:
    """The median of the steps once all prompts are computed."""
    names = []
    for prompt, constraint in zip(prompts, constraints, strict=True):
        params = SamplingParams(
            temperature=0, max_tokens=steps + 8 * len(prompts), ignore_eos=True, structured_outputs=constraint
        )
        names.append(llm.submit(prompt, params))
    try:
        begun: set[str] = set()
        while len(begun) < len(names):
            begun |= {output.request_id for output in llm.step()}
        return median(_timed_step(llm, len(names)) for _ in range(steps))
    finally:
        for name in names:
            llm.abort(name)
        while llm.has_work:
            llm.step()


def _timed_step(llm: LLM, rows: int) -> float:
    start = time.perf_counter()
    outputs = llm.step()
    seconds = time.perf_counter() - start
    for output in outputs:
        if output.error is not None:
            raise RequestError(f"request {output.request_id} of the benchmark failed: {output.error}")
    if len(outputs) < rows:
        raise RequestError(f"only {len(outputs)} of {rows} rows were in a step; the KV memory holds no more")
    return seconds
