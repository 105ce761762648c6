"""What is launched once at load, so that nothing is compiled later: Triton compiles a kernel when it is first launched with constants,
types and sizes of a kind, some seconds each, and the device loads it.

Kernels know the number of rows by two things alone: powers of two, and the tiles of products, which change at the buckets of
linear.CONFIGS (of experts: where each has so many rows on average). So a chunk of every power of two up to the last bucket meets all
of them. Everything happens in scratch pages, and at position 0, which is in every table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from shoal.kernels import samplers
from shoal.kernels.base import Experts, SampleRows, StepInput
from shoal.kernels.cuda import linear
from shoal.kernels.cuda.experts import ExpertTables
from shoal.kernels.cuda.recording import Call


def chunk_sizes(calls: Sequence[Call], most: int) -> list[int]:
    """Rows of chunks after which a program of these calls, for at most ``most`` rows, launches nothing new."""
    tables = [value for call in calls for value in call.arguments.values() if isinstance(value, ExpertTables)]
    share = max([1.0, *(_rows_per_slot(table.experts) for table in tables)])
    last = int(sorted(linear.CONFIGS)[-2] * share) + 1  # has the last configuration
    return [*(1 << power for power in range(1, min(last, most).bit_length())), min(2 * last, most)]


def _rows_per_slot(experts: Experts) -> float:
    """How many rows there are for one that an expert gets on average."""
    return len(experts.down) / experts.routing.used


def chunk(rows: int, scratch_pages: Sequence[int]) -> StepInput:
    """A sequence with so many rows, all of them at position 0."""
    return _step(np.array([0, rows]), scratch_pages)


def singles(rows: int, scratch_pages: Sequence[int]) -> StepInput:
    """So many sequences of one row."""
    return _step(np.arange(rows + 1), scratch_pages)


def _step(row_start: Any, scratch_pages: Sequence[int]) -> StepInput:
    rows, seqs = int(row_start[-1]), len(row_start) - 1
    table = np.tile(np.array(scratch_pages, np.int32)[:, None, None], (1, seqs, 1))
    zeros = np.zeros(rows, np.int32)
    return StepInput(zeros, zeros, row_start.astype(np.int32), np.ones(seqs, np.int32), table)


def is_sampled(calls: Sequence[Call]) -> bool:
    """Whether tokens are sampled from what these calls compute: an encoder's rows see what follows them."""
    shapes = [call.arguments["shape"] for call in calls if "shape" in call.arguments]
    return all(shape.causal for shape in shapes)


def samples(vocab: int) -> Iterator[SampleRows]:
    """Every way to sample: greedy, all candidates, the best of them; with and without masks, banned ids and every kind of sampler."""
    ids, counts = np.zeros(1, np.int32), np.ones(1, np.int32)
    chains: list[tuple[samplers.Sampler, ...]] = [
        (samplers.Bias(ids, np.ones(1, np.float32)), samplers.Penalties(ids, counts, 1.1, 0.1, 0.1)),
        (samplers.TopNSigma(1.0), samplers.Temperature(0.8), samplers.TopK(40), samplers.TopP(0.9), samplers.MinP(0.1)),
        (samplers.Temperature(0.8, spread=0.5), samplers.Typical(0.9), samplers.XTC(0.5, 0.1)),
        (samplers.Mirostat(1, 10.0),),
        (samplers.Mirostat(2, 10.0),),
    ]
    every_id = np.full(-(-vocab // 32), 2**32 - 1, np.uint32)
    for temperature, top_k in ((0.0, 0), (1.0, 0), (1.0, 40)):
        plain = _rows(len(chains), temperature, top_k)
        yield SampleRows(**plain, banned=[None] * len(chains))
        yield SampleRows(
            **plain,
            banned=[ids] * len(chains),
            mask=[every_id] * len(chains),
            samplers=chains,
            surprise=np.zeros(len(chains), np.float32),
        )


def _rows(count: int, temperature: float, top_k: int) -> dict[str, Any]:
    return {
        "temperature": np.full(count, temperature, np.float32),
        "top_k": np.full(count, top_k, np.int32),
        "top_p": np.ones(count, np.float32),
        "min_p": np.zeros(count, np.float32),
        "seed": np.zeros(count, np.uint64),
        "sample": np.zeros(count, np.uint32),
        "position": np.zeros(count, np.uint32),
    }
