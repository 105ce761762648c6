"""Programs that share a task leave parts of it in memory, and whoever is done last puts them together. Nobody waits for anybody.

Why that is deterministic: an integer counter decides who puts the parts together, never what they are nor their order.

Why the last one sees all parts, on NVIDIA's GPUs:

    each program     all threads store their part
                     barrier                            orders the stores of all threads of the program before what follows it
                     thread 0: counter += 1, acq_rel    a release at the scope of the GPU: who reads this count or a later one sees them
    the last one     the same addition is an acquire    it reads the last count, which comes after the releases of all others
                     barrier                            hands the count from thread 0 to all: Triton's own, as of every scalar result
                     all threads load the parts         past the L1 cache (".cg"), which knows nothing of what others have stored

The last one sets the counter to zero for the next launch, which begins to work when this one has ended (dependent.py).

On AMD a barrier of Triton's waits for shared memory alone: stores of other waves may still be on their way when wave 0 counts the
program. So nothing is shared there (`Chip.side_by_side`): one program does a task alone.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_last(counter, programs):  # type: ignore[no-untyped-def]
    """Whether all others of so many programs came here before. To be called by all of them, behind their stores."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter, 0)
    return last
