"""NumPy's side of ``shoal bench kernels``: float32 products by its BLAS, in a process whose threads disturb nobody else's.

    python -m shoal.bench.kernels.sgemm_worker THREADS

It says one line of JSON when it is ready; each line of JSON on stdin is a turn (the arguments of ``measure``), answered by one line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence


def main(threads: str) -> None:
    """Answer turns until stdin ends."""
    # Every BLAS that NumPy may be built with reads one of these when it is loaded.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS"):
        os.environ[name] = threads
    import numpy

    print(json.dumps({"version": numpy.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": measure(**json.loads(line))}), flush=True)


def measure(shape: Sequence[int], rows: Sequence[int], rounds: int) -> list[list[float]]:
    """Seconds of ``rounds`` products of a matrix of ``shape`` with each number of rows: a list for each.

    The matrix lies as it does in a file or transposed, whichever is faster.
    """
    import numpy as np

    from shoal.bench.timing import timings

    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape, np.float32)
    transposed = np.ascontiguousarray(weight.T)

    def fastest(count: int) -> list[float]:
        x, out = rng.standard_normal((count, shape[1]), np.float32), np.empty((count, shape[0]), np.float32)
        either = (
            timings(lambda: np.matmul(x, weight.T, out), rounds),
            timings(lambda: np.matmul(x, transposed, out), rounds),
        )
        return min(either, key=np.median)

    return [fastest(count) for count in rows]


if __name__ == "__main__":
    main(sys.argv[1])
