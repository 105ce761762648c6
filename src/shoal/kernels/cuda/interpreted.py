"""Triton's interpreter, with products whose order of sums does not depend on their shape.

Its ``tl.dot`` is NumPy's float32 product, and a BLAS adds in another order for another number of columns: not what a matrix instruction
does. Here products of float16 and their sums are float64, which holds them exactly but for numbers that are 2^20 apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime import interpreter


def _create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    sums = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
    return interpreter.TensorHandle(sums.astype(d.data.dtype) + d.data, d.dtype.scalar)


def use_ordered_products() -> None:
    """From now on, in this process."""
    interpreter.InterpreterBuilder.create_dot = _create_dot
