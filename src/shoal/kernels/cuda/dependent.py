"""Programmatic dependent launch: a kernel begins while the one before still runs, and waits for its results itself.

Between two kernels a GPU is empty for some microseconds: the last programs of one end, then the next is set up. With the option
``launch_pdl`` (sm_90 and later; launch.py gives it to kernels that have a parameter PDL) a kernel is set up as soon as all programs
of the one before have called ``gdc_launch_dependents`` or ended.

Why a chain of such kernels is safe. Every kernel that has PDL calls ``wait_for_earlier`` before it reads or writes any memory.
``gdc_wait`` returns when the kernel before has ended and its writes can be seen. That one has waited too before it did anything, so
it cannot have ended before the one before it had; and so on: whoever has waited comes after all earlier kernels of the stream, not
only after the last. Dependents are let go after the wait, so no more than two kernels of a stream are under way. A kernel without
PDL, a copy or an event is started when all before it has ended, as ever, and a kernel with PDL after one without waits for the whole
of it. That nothing comes before the wait is checked in the compiled code (compile_ahead.py).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_earlier(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """First of all in a kernel: nothing if it is launched as ever."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
