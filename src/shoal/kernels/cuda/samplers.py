"""The samplers of a batch as steps: at each place of the rows' lists, those of one kind together. Each step is a few launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.kernels.cuda.dry import dry_penalties
from shoal.kernels.cuda.launch import Tensor, launch
from shoal.kernels.cuda.sample_row import BLOCK, CHUNK, CHUNK_WARPS, ROW_WARPS
from shoal.kernels.cuda.sample_space import Space
from shoal.kernels.cuda.sample_steps import (
    KEEP_COUNT,
    KEEP_MASS,
    KEEP_NEAR,
    KEEP_SIGMA,
    KEEP_SURPRISE,
    KEEP_WEIGHT,
    add_to_ids,
    count_by_zipf,
    drop_top,
    keep_first,
    keep_near_chunk,
    penalise_ids,
    scale_chunk,
    spread_chunk,
)
from shoal.kernels.samplers import (
    XTC,
    Bias,
    Dry,
    MinP,
    Mirostat,
    Penalties,
    Sampler,
    Temperature,
    TopK,
    TopNSigma,
    TopP,
    Typical,
)

Arrays = list[NDArray[Any]]
Apply = Callable[[Space, Sequence[Tensor]], None]
Rows = Sequence[tuple[int, Any]]  # a row and its sampler
ENTRIES = 256  # pairs of a row and an id of one program


@dataclass(frozen=True, slots=True)
class Step:
    """What to launch, and the arrays that it takes on the device."""

    apply: Apply
    arrays: Arrays


def sampler_steps(samplers: Sequence[tuple[Sampler, ...] | None]) -> list[Step]:
    """The steps of all rows. Each row has its samplers in their order; rows do not wait for each other's kinds."""
    lists = [row or () for row in samplers]
    steps = []
    for place in range(max(map(len, lists), default=0)):
        kinds: dict[object, list[tuple[int, Sampler]]] = {}
        for row, own in enumerate(lists):
            if place < len(own):
                kinds.setdefault(_kind(own[place]), []).append((row, own[place]))
        steps += [_STEPS[kind](rows) for kind, rows in kinds.items()]
    return steps


def _kind(sampler: Sampler) -> object:
    return (Mirostat, sampler.version) if isinstance(sampler, Mirostat) else type(sampler)


def entries(lists: Sequence[tuple[int, NDArray[np.int32]]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Rows and their ids as pairs."""
    rows = np.repeat(np.array([row for row, _ in lists], np.int32), [len(ids) for _, ids in lists])
    return rows, np.concatenate([ids for _, ids in lists]).astype(np.int32)


# --- samplers that change few scores ---------------------------------------------------------------------------------


def _bias(rows: Rows) -> Step:
    return _add([(row, bias.ids, bias.values) for row, bias in rows])


def _dry(rows: Rows) -> Step:
    lost = [(row, *dry_penalties(dry)) for row, dry in rows]
    return _add([(row, ids, -values) for row, ids, values in lost])


def _add(lists: list[tuple[int, NDArray[np.int32], NDArray[np.float32]]]) -> Step:
    pairs = entries([(row, ids) for row, ids, _ in lists])
    values = np.concatenate([values for _, _, values in lists]).astype(np.float32)
    return Step(partial(_apply_entries, add_to_ids, len(values)), [*pairs, values])


def _penalties(rows: Rows) -> Step:
    pairs = entries([(row, penalties.ids) for row, penalties in rows])
    counts = np.concatenate([penalties.counts for _, penalties in rows]).astype(np.int32)
    factors = np.ones((rows[-1][0] + 1, 3), np.float32)
    for row, own in rows:
        factors[row] = own.repetition, own.frequency, own.presence
    return Step(partial(_apply_entries, penalise_ids, len(counts)), [*pairs, counts, factors])


def _apply_entries(kernel: Any, size: int, space: Space, arrays: Sequence[Tensor]) -> None:
    grid = (-(-size // ENTRIES),)
    launch(kernel, grid, *arrays, space.scratch, size, WIDTH=space.sizes["WIDTH"], COUNT=ENTRIES)


# --- the others: rows, and four numbers of each ----------------------------------------------------------------------


def _numbered(apply: Apply, fields: Sequence[str], rows: Rows) -> Step:
    """``fields`` of the samplers are their numbers, the empty name is 0."""
    numbers = [[float(getattr(sampler, field)) if field else 0.0 for field in fields] for _, sampler in rows]
    return Step(apply, [np.array([row for row, _ in rows], np.int32), np.array(numbers, np.float64)])


def _temperature(rows: Rows) -> Step:
    dynamic = any(sampler.spread > 0 for _, sampler in rows)
    return _numbered(partial(_apply_temperature, dynamic), ("value", "spread", "exponent", ""), rows)


def _apply_temperature(dynamic: bool, space: Space, arrays: Sequence[Tensor]) -> None:
    rows, numbers = arrays
    space.best(rows, clear=False)
    if dynamic:
        space.sum(rows)
    sums = (space.candidates, space.sums, space.energies)
    grid = (len(rows), space.chunks)
    scores = (space.scratch, space.bests, space.firsts)
    launch(scale_chunk, grid, rows, numbers, *scores, *sums, **space.all_sizes, CHUNK=CHUNK, warps=CHUNK_WARPS)


def _apply_top_n_sigma(space: Space, arrays: Sequence[Tensor]) -> None:
    rows, numbers = arrays
    space.best(rows, clear=False)
    sums = (space.candidates, space.distances, space.squares)
    grid = (len(rows), space.chunks)
    scores = (space.scratch, space.bests, space.firsts)
    launch(spread_chunk, grid, rows, *scores, *sums, **space.all_sizes, CHUNK=CHUNK, warps=CHUNK_WARPS)
    _keep_near(space, rows, numbers, KEEP_SIGMA.value)


def _keep_near(space: Space, rows: Tensor, numbers: Tensor, kind: int) -> None:
    sums = (space.candidates, space.sums, space.distances, space.squares)
    launch(
        keep_near_chunk, (len(rows), space.chunks), rows, numbers, space.scratch, space.bests, space.firsts, *sums,
        **space.all_sizes, CHUNK=CHUNK, KIND=kind, warps=CHUNK_WARPS,
    )  # fmt: skip


def _apply_keep(kind: int, space: Space, arrays: Sequence[Tensor]) -> None:
    rows, numbers = arrays
    space.best(rows, clear=True)
    if kind == KEEP_NEAR.value:
        space.sum(rows)
        space.sum(rows, centred=True, count=True)
    else:
        space.sum(rows, count=True)
    _keep_first(space, rows, numbers, kind)


def _keep_first(space: Space, rows: Tensor, numbers: Tensor, kind: int) -> None:
    launch(
        keep_first, (len(rows),), rows, numbers, space.scratch, space.bests, space.firsts,
        space.sums, space.energies, space.counts, space.masses,
        **space.all_sizes, BLOCK=BLOCK, KIND=kind, warps=ROW_WARPS,
    )  # fmt: skip


def _apply_xtc(space: Space, arrays: Sequence[Tensor]) -> None:
    rows, numbers = arrays
    space.best(rows, clear=False)
    space.sum(rows)
    launch(
        drop_top, (len(rows),), rows, numbers, space.params, space.scratch, space.bests, space.firsts,
        space.candidates, space.sums, **space.all_sizes, BLOCK=BLOCK, warps=ROW_WARPS,
    )  # fmt: skip


def _apply_mirostat_1(space: Space, arrays: Sequence[Tensor]) -> None:
    rows, numbers = arrays
    space.best(rows, clear=True)
    space.sum(rows, count=True)
    launch(
        count_by_zipf, (len(rows),), rows, numbers, space.scratch, space.bests, space.firsts,
        space.counts, space.masses, space.found,
        **space.all_sizes, ROOM=space.found.stride(0), BLOCK=BLOCK, warps=ROW_WARPS,
    )  # fmt: skip
    _keep_first(space, rows, numbers, KEEP_COUNT.value)


def _apply_mirostat_2(space: Space, arrays: Sequence[Tensor]) -> None:
    rows, numbers = arrays
    space.best(rows, clear=False)
    space.sum(rows)
    _keep_near(space, rows, numbers, KEEP_SURPRISE.value)


_STEPS: dict[object, Callable[[Rows], Step]] = {
    Bias: _bias,
    Penalties: _penalties,
    Dry: _dry,
    TopNSigma: partial(_numbered, _apply_top_n_sigma, ("n", "", "", "")),
    Temperature: _temperature,
    Typical: partial(_numbered, partial(_apply_keep, KEEP_NEAR.value), ("p", "", "", "min_keep")),
    MinP: partial(_numbered, partial(_apply_keep, KEEP_WEIGHT.value), ("p", "", "", "min_keep")),
    TopK: partial(_numbered, partial(_apply_keep, KEEP_COUNT.value), ("", "", "", "k")),
    TopP: partial(_numbered, partial(_apply_keep, KEEP_MASS.value), ("p", "", "", "min_keep")),
    XTC: partial(_numbered, _apply_xtc, ("probability", "threshold", "", "min_keep")),
    (Mirostat, 1): partial(_numbered, _apply_mirostat_1, ("mu", "", "", "")),
    (Mirostat, 2): partial(_numbered, _apply_mirostat_2, ("mu", "", "", "")),
}
