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
    if ROWS == 1:  # no end to look for
        row, there = tl.full([1, 1], tl.program_id(0), tl.int64), tl.full([1, 1], True, tl.int1)
    else:
        at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        row, there = tl.minimum(at, rows - 1).to(tl.int64), at < rows
    return row, there
