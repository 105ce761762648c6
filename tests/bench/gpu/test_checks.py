"""The checks find nothing in a good backend, and something in each that is broken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from shoal.bench.gpu import checks
from shoal.errors import EngineError
from shoal.kernels.base import Backend
from shoal.kernels.cpu.backend import CPUBackend
from shoal.kernels.reference import ReferenceBackend

REFERENCE = ReferenceBackend()
INT8_LIMIT = 5e-4  # activations of the CPU's products are int8


@pytest.fixture(scope="module")
def cpu() -> Iterator[Backend]:
    backend = CPUBackend(1)
    yield backend
    backend.close()


def test_a_good_backend_passes(cpu: Backend) -> None:
    cases = list(checks.cases(cpu, ["Q4_K", "I2_S"]))
    errors = {case.name: checks.check_case(case, cpu, REFERENCE, INT8_LIMIT) for case in cases}
    assert 0 < errors["linear Q4_K"] < INT8_LIMIT
    assert {name.split()[0] for name in errors} >= {"linear", "embed", "gated", "activate", "rms", "layer", "experts"}
    for case in checks.attentions():
        assert checks.check_attention(case, cpu, REFERENCE, INT8_LIMIT) < INT8_LIMIT
    assert checks.check_model("Q4_K_M", cpu, REFERENCE, INT8_LIMIT) < INT8_LIMIT


def test_an_error_that_is_too_large_is_found(cpu: Backend) -> None:
    (case,) = (case for case in checks.cases(cpu, ["Q4_K"]) if case.name == "linear Q4_K")
    with pytest.raises(EngineError, match=r"linear Q4_K: NMSE \S+, at most 1e-09"):
        checks.check_case(case, cpu, REFERENCE, 1e-9)


class _Spoilt(ReferenceBackend):
    """Adds something to the logits that depends on the number of rows in the step."""

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        bound = super().bind(*args, **kwargs)
        layers, logits = bound.layers, bound.logits

        def counted(step: Any) -> None:
            self.rows = len(step.token_ids)
            layers(step)

        bound.layers = counted  # type: ignore[method-assign]
        bound.logits = lambda rows: logits(rows) + np.float32(1e-6 * (self.rows % 2))  # type: ignore[method-assign]
        return bound


def test_bits_that_depend_on_other_rows_are_found() -> None:
    spoilt = _Spoilt()
    with pytest.raises(EngineError, match="other bits"):
        checks.check_case(next(checks.cases(spoilt, ["Q8_0"])), spoilt, REFERENCE)
    with pytest.raises(EngineError, match="other bits"):
        checks.check_attention(next(checks.attentions()), spoilt, REFERENCE)
    with pytest.raises(EngineError, match="other bits"):
        checks.check_model("Q4_K_M", spoilt, REFERENCE)


def test_numbers_that_are_none_are_an_infinite_error() -> None:
    right = np.ones((2, 3), np.float32)
    assert checks.nmse(np.full((2, 3), np.nan, np.float32), right) == float("inf")
    assert checks.nmse(right, right) == 0
