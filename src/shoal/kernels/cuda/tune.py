"""Tiles of products chosen by measuring, and the file that keeps them: one for each device, version of shoal and of Triton.

Only what leaves the order of sums alone is chosen (linear.py: ``Config``), so a table, whatever is in it, changes no bit of a result.
No table comes with shoal: none has been measured yet.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import astuple, replace
from pathlib import Path

import torch
import triton

from shoal.kernels.cuda import linear
from shoal.kernels.cuda.launch import device, on_gpu
from shoal.kernels.cuda.linear import FEW, GATED_TILE, TUNED, Config, Form
from shoal.kernels.cuda.pack import PackedMatrix
from shoal.system.folders import cache_folder
from shoal.version import __version__

Key = tuple[str, int, int, int, Form]  # as of linear.TUNED
Table = dict[Key, Config]

_log = logging.getLogger(__name__)
_CACHED_BYTES = 256 << 20  # what no cache of a GPU holds: weights must come from memory, as in a model
_KEY = re.compile(r"(\w+) (\d+)x(\d+) (\d+)( floats)?( gated)?")
# A tile of 64 weight rows is one group of 4 warps'; both make the compiler take the same matrix instruction.
_TILES = ((64, 4), (128, 4), (128, 8))
_STAGES = (2, 3, 4)


def candidates(bucket: int, form: Form) -> list[Config]:
    """What can be chosen for up to ``bucket`` rows; the usual configuration of the chip first."""
    usual = linear.usual_config(bucket, form)
    tiles = [(m, warps) for m, warps in _TILES if m == GATED_TILE or not form.gated]
    found = [Config(m, usual.block_n, warps, stages) for m, warps in tiles for stages in _STAGES]
    return [usual, *(config for config in found if config != usual)]


def fastest(configs: Sequence[Config], seconds: Callable[[Config], float]) -> Config | None:
    """The one that takes least, the first among equals. One that cannot run (too much shared memory) is left out; None: none can."""
    times: dict[Config, float] = {}
    for config in configs:
        try:
            times[config] = seconds(config)
        except (RuntimeError, triton.TritonError) as problem:
            _log.info("%s cannot run: %s", config, problem)
    good = [config for config, time in times.items() if math.isfinite(time)]
    return min(good, key=times.__getitem__, default=None)


def tune(
    products: Iterable[tuple[PackedMatrix, Form]],
    rows: Iterable[int],
    seconds: Callable[[Callable[[], None]], float],
    enough: Callable[[], bool] = lambda: False,
) -> Table:
    """Measure every part of some matrices, as products of a form, at the buckets of some numbers of rows, and use from now on what was
    fastest. Matrices that can't be gated are measured without. ``seconds`` says how long a run takes; once there is ``enough``, what
    is left stays as it is: most of the time goes to compiling. Returns what was found new."""
    found: Table = {}
    parts = [(part, _possible(matrix, form)) for matrix, form in products for part in matrix.parts]
    for bucket in sorted({linear.bucket(count) for count in rows}):  # parts of a type share the kernels of a bucket
        for part, form in parts:
            taken = form if bucket <= FEW else replace(form, floats=False)  # many rows are rounded before
            key = (part.layout.name, part.rows, part.columns, bucket, taken)
            if key in TUNED or enough():
                continue
            alone = replace(part, first_row=0)  # else its columns would lie outside of the output
            best = _best(PackedMatrix(part.rows, part.columns, (alone,)), key, seconds)
            if best is not None:
                found[key] = TUNED[key] = best
    return found


def _possible(matrix: PackedMatrix, form: Form) -> Form:
    return replace(form, gated=form.gated and linear.can_gate(matrix))


def _best(matrix: PackedMatrix, key: Key, seconds: Callable[[Callable[[], None]], float]) -> Config | None:
    *_, bucket, form = key
    run = _products(matrix, bucket, form)

    def measured(config: Config) -> float:
        with _using(key, config):
            return seconds(run)

    return fastest(candidates(bucket, form), measured)


@contextmanager
def _using(key: Key, config: Config) -> Iterator[None]:
    TUNED[key] = config
    try:
        yield
    finally:
        del TUNED[key]


def _products(matrix: PackedMatrix, rows: int, form: Form) -> Callable[[], None]:
    """Products with so many copies of the matrix that none of them is still in a cache."""
    count = min(16, -(-_CACHED_BYTES // matrix.nbytes)) if on_gpu() else 1
    copies = [matrix, *(deepcopy(matrix) for _ in range(count - 1))]
    half = torch.ones((rows, matrix.columns), dtype=torch.float16, device=device())
    source = linear.Source(half, torch.ones(rows, device=device()))
    if form.floats:
        largest = torch.ones((triton.cdiv(matrix.columns, GATED_TILE), rows), device=device())
        source = replace(source, floats=half.float(), largest=largest)
    out = torch.empty((rows, matrix.rows), device=device())
    tile_largest = torch.empty((linear.gated_parts(matrix), rows), device=device())
    scratch = linear.scratch_for([matrix], rows)

    def run() -> None:
        for copy in copies:
            if form.gated:
                linear.linear_gated(source, copy, out, rows, "silu", scratch=scratch, largest=tile_largest)
            else:
                linear.linear(source, copy, out, rows, scratch=scratch)

    return run


# --- the file --------------------------------------------------------------------------------------------------------


def table_path() -> Path | None:
    """Of this device and these versions, in shoal's cache folder (or SHOAL_TUNED); None where there is no such folder."""
    try:
        folder = cache_folder("SHOAL_TUNED", "tuned")
    except ImportError:  # of platformdirs: `shoal bench gpu` runs without it
        return None
    name = torch.cuda.get_device_name(device()) if on_gpu() else "interpreter"
    words = "-".join(re.findall(r"[\w.]+", f"{name} shoal {__version__} triton {triton.__version__}"))
    return None if folder is None else folder / f"{words}.json"


def load(path: Path | None) -> int:
    """Use the table in this file, if there is one; how many entries it has. One that is damaged is left alone, with a warning."""
    if path is None or not path.exists():
        return 0
    try:
        table = _read(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as problem:
        _log.warning("%s: not a table of tuned kernels, ignored: %s", path, problem)
        return 0
    TUNED.update(table)
    return len(table)


def entries(table: Mapping[Key, Config]) -> dict[str, list[int]]:
    """A table as JSON has it: "TYPE ROWSxCOLUMNS BUCKET[ floats][ gated]" -> the numbers of a configuration."""
    return {_text(key): list(astuple(table[key])) for key in sorted(table)}


def _text(key: Key) -> str:
    name, rows, columns, size, form = key
    return f"{name} {rows}x{columns} {size}{' floats' * form.floats}{' gated' * form.gated}"


def save(path: Path, table: Mapping[Key, Config]) -> None:
    """Write a table, or replace it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(entries(table), indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _read(text: str) -> Table:
    """Raises ValueError or TypeError for anything that ``save`` does not write."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return {_key(name): _config(_key(name), values) for name, values in found.items()}


def _key(text: str) -> Key:
    match = _KEY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not TYPE ROWSxCOLUMNS BUCKET[ floats][ gated]")
    name, rows, columns, size, floats, gated = match.groups()
    return name, int(rows), int(columns), int(size), Form(floats is not None, gated is not None)


def _config(key: Key, values: list[int]) -> Config:
    """Only what could have been chosen: another tile might change bits, or hang."""
    config = Config(*values)
    *_, bucket, form = key
    if bucket not in linear.CONFIGS or config not in candidates(bucket, form):
        raise ValueError(f"{config} is no choice for {key}")
    return config
