"""Programs as CUDA graphs: one launch for all kernels of a step, where a launch of each from Python takes longer than it runs.

A graph is of a fixed size. There is one for each *bucket* of rows (1, 2, 4, ...); a step has the next larger one's, padded with
rows that nobody reads. Under the interpreter nothing is captured, but programs run at the same sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from shoal.kernels.cuda.launch import on_gpu

Program = Callable[[int], None]  # of a number of rows
LARGEST_BUCKET = 256


def buckets_up_to(rows: int) -> tuple[int, ...]:
    """Powers of two, the last of them no less than ``rows`` if that is at most LARGEST_BUCKET."""
    last = min(max(rows - 1, 0).bit_length(), LARGEST_BUCKET.bit_length() - 1)
    return tuple(1 << power for power in range(last + 1))


class Graphs:
    """What ``program`` does with each bucket of rows. ``prepare`` sets up what it reads for a bucket that is all padding."""

    def __init__(self, program: Program, buckets: Sequence[int], prepare: Callable[[int], object]) -> None:
        self._program, self._buckets = program, tuple(buckets)
        self._captured: dict[int, Callable[[], None]] = {}
        if on_gpu():
            for bucket in reversed(self._buckets):  # the largest first: the others fit into its memory
                prepare(bucket)
                self._captured[bucket] = _capture(program, bucket)

    def bucket(self, rows: int) -> int | None:
        """The smallest that holds so many rows; None where they are too many."""
        return next((bucket for bucket in self._buckets if bucket >= rows), None)

    def run(self, bucket: int) -> None:
        """Replay it."""
        if self._captured:
            self._captured[bucket]()
        else:
            self._program(bucket)


def _capture(program: Program, bucket: int) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled and loaded before: neither may happen in a capture
        program(bucket)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the device meanwhile
        program(bucket)
    return graph.replay  # type: ignore[no-any-return]
