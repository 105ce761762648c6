"""How many rows a program takes: one, so that a few rows keep a GPU busy; many under the interpreter, where every program costs the
same milliseconds whatever it holds. A row's bits are the same with any number."""

from __future__ import annotations

import triton
import triton.language as tl

from shoal.kernels.cuda.launch import INTERPRETED

MOST_ROWS = 64 if INTERPRETED else 1


def row_tiles(rows: int) -> tuple[int, dict[str, int]]:
    """Of kernels over so many rows: programs along the first axis of the grid, and the constant for ``rows_of_program``."""
    together = min(triton.next_power_of_2(rows), MOST_ROWS)
    return triton.cdiv(rows, together), {"ROWS": together}


@triton.jit
def rows_of_program(rows, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The rows to read, int64 [ROWS, 1], and which of them to write: past the end the last row is read again."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    return tl.minimum(row, rows - 1).to(tl.int64), row < rows
