"""``shoal bench kernels``: products with every weight type, few rows to many, beside what the machine allows at best.

A matrix comes from memory (copies that no cache holds, one after the other) or stays in the cache (a small one, again and again).
The floor of a product is its bytes over read bandwidth or its multiply-adds over their peak, whichever takes longer; in the cache
its multiply-adds alone. Their peak is that of int8 where weights are quantised, of float32 where they are not.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shoal.bench.machine import Peaks, cpu_name, measure_peaks
from shoal.bench.markdown import table
from shoal.bench.products import Products
from shoal.bench.timing import timings
from shoal.bench.turns import OtherLoad, Worker
from shoal.errors import ParameterError
from shoal.gguf.quants import FORMATS, QuantFormat, format_named
from shoal.kernels.base import Backend
from shoal.kernels.load import load_backend
from shoal.version import __version__

STREAM_BYTES = 256 << 20  # of matrices that are to come from memory: more than caches hold
_MOST_COPIES = 128
_REPEATS = 64  # products of a cached matrix in one pass
_SETTLE_SECONDS = 0.2  # threads of NumPy's BLAS stop spinning
MEMORY, CACHE = "memory", "cache"

Shape = tuple[int, int]  # rows and columns of a matrix


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to measure: ``types`` by name (none: all that the backend has), each with ``rows`` tokens; a matrix of ``shape`` from
    memory, one of ``cached_shape`` in the cache."""

    types: tuple[str, ...] = ()
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 128)
    shape: Shape = (4096, 4096)
    cached_shape: Shape = (512, 512)
    rounds: int = 5
    threads: int = 2
    device: str = "cpu"

    def places(self) -> dict[str, Shape]:
        """Where matrices lie, and their shape there."""
        return {MEMORY: self.shape, CACHE: self.cached_shape}


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix times ``rows`` tokens: median ``seconds``, the ``floor`` on this machine, and those of NumPy's float32 product
    of the same size. ``num_bytes``: of the matrix in a file."""

    type: str
    place: str
    shape: Shape
    rows: int
    num_bytes: int
    seconds: float
    floor: float
    sgemm_seconds: float

    @property
    def mac_rate(self) -> float:
        """Multiply-adds a second."""
        return self.rows * self.shape[0] * self.shape[1] / self.seconds

    @property
    def byte_rate(self) -> float:
        """Bytes of weights a second."""
        return self.num_bytes / self.seconds

    @property
    def reached(self) -> float:
        """Share of the roofline."""
        return self.floor / self.seconds

    @property
    def sgemm_ratio(self) -> float:
        """How many times as fast as NumPy."""
        return self.sgemm_seconds / self.seconds

    def as_json(self) -> dict[str, Any]:
        """All fields, and what follows from them."""
        derived = ("mac_rate", "byte_rate", "reached", "sgemm_ratio")
        return asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True, slots=True)
class KernelReport:
    """All products, with what one needs to repeat them. ``other_load``: share of the machine that others used in NumPy's turns."""

    cpu: str
    backend: str
    peaks: Peaks
    rounds: int
    products: Sequence[Product]
    other_load: float

    def as_markdown(self) -> str:
        """A heading and a table for each quantity: a line a type, a column a number of rows."""
        parts = [
            f"shoal {__version__}, {self.backend}, medians of {self.rounds} rounds.",
            f"Machine: {self.cpu}; {self.peaks}. Other processes used {self.other_load:.1%} of it during NumPy's turns.",
        ]
        for place in dict.fromkeys(product.place for product in self.products):
            parts += _tables([product for product in self.products if product.place == place])
        return "\n\n".join(parts)

    def as_json(self) -> dict[str, Any]:
        """The same, for programs."""
        return asdict(self) | {"version": __version__, "products": [product.as_json() for product in self.products]}


def measure_kernels(plan: Plan, say: Callable[[str], None]) -> KernelReport:
    """Measure everything; ``say`` hears how it goes.

    Raises UnsupportedError or ParameterError for a type that is unknown or that the backend does not have, ParameterError for a
    shape whose rows are no whole number of a type's blocks.
    """
    backend = load_backend(plan.device, plan.threads)
    try:
        formats = _formats(plan, backend)
        say("measuring the machine")
        peaks, load = measure_peaks(plan.threads), OtherLoad()
        with Worker("NumPy", [sys.executable, "-m", "shoal.bench.kernels.sgemm_worker", str(plan.threads)]) as sgemm:
            products = [
                product
                for fmt in formats
                for place in plan.places()
                for product in _Case(plan, backend, peaks, fmt, place).products(sgemm, load, say)
            ]
        return KernelReport(cpu_name(), backend.describe(), peaks, plan.rounds, products, load.share)
    finally:
        backend.close()


@dataclass(frozen=True, slots=True)
class _Case:
    """One type in one place."""

    plan: Plan
    backend: Backend
    peaks: Peaks
    format: QuantFormat
    place: str

    def products(self, sgemm: Worker, load: OtherLoad, say: Callable[[str], None]) -> Iterator[Product]:
        """NumPy's turn, then ours, with each number of rows."""
        say(f"{self.format.name} from {self.place}")
        shape, plan = self.plan.places()[self.place], self.plan
        answer = load.watch(sgemm, {"shape": shape, "rows": plan.rows, "rounds": plan.rounds})
        time.sleep(_SETTLE_SECONDS)
        num_bytes = shape[0] * self.format.row_bytes(shape[1])
        copies, repeats = (
            (min(-(-STREAM_BYTES // num_bytes), _MOST_COPIES), 1) if self.place == MEMORY else (1, _REPEATS)
        )
        products = Products(self.backend, self.format, shape, max(plan.rows), copies=copies, repeats=repeats)
        for rows, theirs in zip(plan.rows, answer["seconds"], strict=True):
            ours = timings(lambda rows=rows: products.run(rows), plan.rounds)  # type: ignore[misc]
            yield Product(
                type=self.format.name,
                place=self.place,
                shape=shape,
                rows=rows,
                num_bytes=num_bytes,
                seconds=statistics.median(ours) / products.products,
                floor=self.floor(rows * shape[0] * shape[1], num_bytes),
                sgemm_seconds=statistics.median(theirs),
            )

    def floor(self, macs: int, num_bytes: int) -> float:
        """The least seconds that so many multiply-adds with so many bytes of weights take."""
        rate = self.peaks.float_rate if self.format.block_size == 1 else self.peaks.int8_rate
        read = num_bytes / self.peaks.read_bandwidth if self.place == MEMORY else 0.0
        return max(read, macs / rate)


def _formats(plan: Plan, backend: Backend) -> list[QuantFormat]:
    """The formats to measure."""
    available = [fmt for fmt in FORMATS.values() if backend.supports(fmt)]
    chosen = [format_named(name) for name in plan.types] or available
    for fmt in chosen:
        if fmt not in available:
            raise ParameterError("type", fmt.name, "one of " + ", ".join(f.name for f in available))
        for rows, columns in plan.places().values():
            if columns % fmt.block_size:
                right = f"rows of a multiple of {fmt.block_size} columns for {fmt.name}"
                raise ParameterError("shape", f"{rows}x{columns}", right)
    return chosen


def _tables(products: Sequence[Product]) -> list[str]:
    """Headings and tables of one place."""
    (rows, columns), place = products[0].shape, products[0].place
    where = f"by number of tokens: {rows} x {columns}, {'from memory' if place == MEMORY else 'in the cache'}"
    parts = [f"**GMAC/s (share of the roofline) {where}**", _rates(products)]
    if place == MEMORY:
        parts += [f"**GB/s of weights {where}**", _grid(products, lambda p: f"{p.byte_rate / 1e9:.1f}")]
    times_numpy = _grid(products, lambda p: f"{p.sgemm_ratio:.2f}")
    return [*parts, f"**Times NumPy's float32 product {where}**", times_numpy]


def _rates(products: Sequence[Product]) -> str:
    """Multiply-adds a second of every type, and NumPy's in a last line."""
    columns = sorted({product.rows for product in products})
    sgemm = []
    for rows in columns:
        same = [product for product in products if product.rows == rows]
        seconds = statistics.median(product.sgemm_seconds for product in same)
        sgemm.append(f"{same[0].mac_rate * same[0].seconds / seconds / 1e9:.1f}")
    grid = _grid(products, lambda p: f"{p.mac_rate / 1e9:.1f} ({p.reached:.0%})")
    return f"{grid}\n| NumPy, float32 | {' | '.join(sgemm)} |"


def _grid(products: Sequence[Product], cell: Callable[[Product], str]) -> str:
    """A line a type, a column a number of rows."""
    columns = sorted({product.rows for product in products})
    found = {(product.type, product.rows): cell(product) for product in products}
    types = dict.fromkeys(product.type for product in products)
    return table(["type", *map(str, columns)], ([name, *(found[name, rows] for rows in columns)] for name in types))
