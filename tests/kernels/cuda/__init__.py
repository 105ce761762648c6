"""Kernels in Triton run under its interpreter here, on tensors in the memory of the CPU."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

for _package in ("torch", "triton"):
    pytest.importorskip(_package, reason=f"{_package} is not installed: pip install '.[cuda]'")
