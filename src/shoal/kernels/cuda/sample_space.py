"""The memory of a sampler on the device, and the passes over its rows that many steps begin with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.kernels.cuda.launch import Tensor, device, launch, on_gpu
from shoal.kernels.cuda.sample_draw import GATHERED
from shoal.kernels.cuda.sample_row import BINS, CHUNK, CHUNK_WARPS, LARGEST_VOCAB, PARAMS, best_of_chunk
from shoal.kernels.cuda.sample_steps import sum_chunk

_ALIGNMENT = 16  # bytes


def pinned(size: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Memory of the host that is copied from and to without waiting."""
    return torch.zeros(size, dtype=dtype, pin_memory=on_gpu())


class Staging:
    """Arrays on their way to the device, in one copy. The host's two buffers take turns: one may still be on its way."""

    def __init__(self, size: int) -> None:
        self._reserve(size)

    def put(self, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        """The arrays on the device, valid until the next ``put``. Those of no element are of one zero."""
        arrays = [array if array.size else np.zeros(1, array.dtype) for array in arrays]
        starts = np.cumsum([0, *(-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays)]).tolist()
        if starts[-1] > len(self._device):
            self._reserve(2 * starts[-1])
        self._hosts.reverse()
        host, views = self._hosts[0], []
        for array, start in zip(arrays, starts, strict=False):
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            host.numpy()[start : start + len(raw)] = raw
            dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
            views.append(self._device[start : start + len(raw)].view(dtype))
        self._device[: starts[-1]].copy_(host[: starts[-1]], non_blocking=True)
        return views

    def _reserve(self, size: int) -> None:
        self._hosts = [pinned(size), pinned(size)]
        self._device = torch.zeros(size, dtype=torch.uint8, device=device())


class Space:
    """Buffers for ``max_rows`` rows. ``sizes`` are the constants by which kernels are compiled."""

    def __init__(self, vocab: int, max_rows: int) -> None:
        if vocab > LARGEST_VOCAB:
            raise ValueError(f"a vocabulary of {vocab} tokens: no more than {LARGEST_VOCAB} can be sampled from")
        self.chunks = -(-vocab // CHUNK)
        width, spread = -(-vocab // 16) * 16, 1 << (self.chunks - 1).bit_length()
        self.sizes = {"WIDTH": width, "CHUNKS": spread}
        self.all_sizes = {"VOCAB": vocab, **self.sizes}

        def full(count: int, dtype: torch.dtype, value: float = 0) -> Tensor:
            return torch.full((max_rows, count), value, dtype=dtype, device=device())

        self.scratch = full(width, torch.float32)
        # Of each chunk. What is past the last chunk adds nothing.
        self.bests, self.firsts = full(spread, torch.float32, -float("inf")), full(spread, torch.int32)
        self.candidates = full(spread, torch.int32)
        self.sums, self.energies = full(spread, torch.int64), full(spread, torch.int64)
        self.distances, self.squares = full(spread, torch.float64), full(spread, torch.float64)
        # Of each bin of keys: all keys', and within one bin.
        self.counts, self.masses = full(2 * BINS.value, torch.int32), full(2 * BINS.value, torch.int64)
        self.found, self.ids = full(GATHERED.value, torch.float32), full(GATHERED.value, torch.int32)
        self.every_row = torch.arange(max_rows, dtype=torch.int32, device=device())
        # Of this step.
        self.params = torch.zeros(max_rows * PARAMS.value, dtype=torch.int32, device=device())
        self.logits = self.scratch

    def best(self, rows: Tensor, *, clear: bool) -> None:
        """Find the best of each chunk of these rows, and maybe clear their bins."""
        logits = (self.logits, self.scratch, self.logits.stride(0))
        launch(
            best_of_chunk, (len(rows), self.chunks), rows, self.params, *logits,
            self.bests, self.firsts, self.counts, self.masses, **self.all_sizes, CHUNK=CHUNK, CLEAR=clear, warps=CHUNK_WARPS,
        )  # fmt: skip

    def sum(self, rows: Tensor, *, centred: bool = False, count: bool = False) -> None:
        """Sum up the candidates of these rows' copies (see `sum_chunk`)."""
        launch(
            sum_chunk, (len(rows), self.chunks), rows, self.scratch, self.bests, self.firsts,
            self.candidates, self.sums, self.energies, self.counts, self.masses,
            **self.all_sizes, CHUNK=CHUNK, CENTRED=centred, COUNT=count, warps=CHUNK_WARPS,
        )  # fmt: skip
