"""The CUDA backend: packs weights, records the network as a program of launches, and replays it as CUDA graphs.

Binding calls the network once with `CudaOps`, whose operations take workspace and append to a program instead of computing. A step of
single rows (all its sequences decode) replays a graph; one with chunks of prompts runs the same program launch by launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from shoal.gguf.quants import QuantFormat
from shoal.kernels.base import (
    LOGIT_ROWS,
    AttentionShape,
    Backend,
    BoundLayers,
    BoundNetwork,
    Head,
    IntArray,
    KVGroup,
    Layers,
    RawTensor,
    SampleRows,
    StepInput,
    StepLimits,
)
from shoal.kernels.cuda import cache, tune
from shoal.kernels.cuda.cache import PagedCache
from shoal.kernels.cuda.graphs import Graphs, buckets_up_to
from shoal.kernels.cuda.launch import INTERPRETED, Tensor, device, on_gpu
from shoal.kernels.cuda.ops import CudaOps, StepMemory
from shoal.kernels.cuda.pack import SUPPORTED, PackedMatrix, pack_matrix
from shoal.kernels.cuda.recording import Rows
from shoal.kernels.cuda.sample import Sampler
from shoal.system.machine_limits import MemoryRoom

_WORKSPACE = 1 << 30  # bytes for what steps need beside weights and pages: rows of activations, logits, graphs


class CudaBackend:
    """Triton kernels on the current GPU, or under Triton's interpreter."""

    name = "cuda"

    def __init__(self, gpu_memory_utilization: float = 0.9) -> None:
        self._device, self._utilization = device(), gpu_memory_utilization
        if on_gpu():
            tune.load(tune.table_path())

    def describe(self) -> str:
        """Which GPU, and by what."""
        kernels = f"Triton {triton.__version__} kernels"
        if INTERPRETED:
            return f"cuda: {kernels} under Triton's interpreter, on the CPU (TRITON_INTERPRET=1; slow, for tests)"
        about = torch.cuda.get_device_properties(self._device)
        return f"cuda: {kernels}, {about.name} (sm_{about.major}{about.minor}, {about.total_memory >> 20} MiB)"

    def supports(self, format: QuantFormat) -> bool:
        """Whether there is a layout for it."""
        return format.name in SUPPORTED

    def matrix(self, parts: Sequence[RawTensor]) -> PackedMatrix:
        """Planes of codes and scales (see pack.py)."""
        return pack_matrix(list(parts))

    def vector(self, tensor: RawTensor) -> Tensor:
        """float32."""
        return torch.from_numpy(tensor.dequantised().copy()).to(self._device)

    def kv_token_bytes(self, kv_heads: int, head_dim: int, dtype: str) -> int:
        """q8_0 has scales beside its values."""
        return cache.token_bytes(kv_heads, head_dim, dtype)

    def kv_cache(self, groups: Sequence[KVGroup], shape: AttentionShape, dtype: str) -> PagedCache:
        """Zeroed pages."""
        return cache.kv_cache(groups, shape, dtype)

    def copy_pages(self, pages: PagedCache, group: int, pairs: Sequence[tuple[int, int]]) -> None:
        """On the device."""
        cache.copy_pages(pages, group, pairs)

    def bind(
        self, layers: Layers, head: Head, cache: PagedCache, limits: StepLimits, states: Head | None = None
    ) -> BoundNetwork:
        """Record the programs and capture their graphs."""
        return _Bound(layers, (head, states), cache, limits)

    def bind_layers(self, layers: Layers, cache: PagedCache, limits: StepLimits) -> BoundLayers:
        """The same without a head."""
        return _Body(layers, cache, limits)

    def owners(self, tensor: str) -> tuple[Backend, ...]:
        """All of it."""
        return (self,)

    def memory_room(self) -> MemoryRoom | None:
        """The share of the device's memory that may be used, less what is taken, by whomever. Under the interpreter there is none."""
        if not on_gpu():
            return None
        free, total = torch.cuda.mem_get_info(self._device)
        reusable = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        limit = int(self._utilization * total)
        taken = total - free - reusable
        return MemoryRoom(max(0, limit - taken - _WORKSPACE), limit, f"gpu_memory_utilization {self._utilization:g}")

    def close(self) -> None:
        """Nothing to stop: memory goes with what holds it."""


class _Body:
    """Recorded layers: the step's arrays, their program, the rows they begin with if those come from elsewhere, the rows they leave."""

    def __init__(self, layers: Layers, cache: PagedCache, limits: StepLimits) -> None:
        buckets = buckets_up_to(limits.max_seqs)
        seqs, rows = (max(most, buckets[-1]) for most in (limits.max_seqs, limits.max_rows))  # with those that pad
        limits = replace(limits, max_rows=rows, max_seqs=seqs)
        self._memory = memory = StepMemory(cache, limits)
        self._ops = CudaOps(memory, rows)
        self._last = layers(self._ops)
        self._rows = 0
        self._ops.finish()
        memory.reserve()
        nothing = _nothing(len(cache.groups))
        # Of the recording, not of this object, which would hold itself then: its memory is to go when nobody holds it.
        self._graphs = Graphs(self._ops.run, buckets, lambda bucket: memory.step.set(nothing, bucket))

    def receive(self, rows: NDArray[np.float32]) -> None:
        assert self._ops.inbox is not None, "these layers begin with an embedding"
        self._ops.inbox.data[: len(rows)].copy_(torch.from_numpy(rows))

    def layers(self, step: StepInput) -> None:
        self._rows = rows = len(step.token_ids)
        bucket = self._graphs.bucket(rows) if rows == len(step.kv_len) else None
        arrays = self._memory.step.set(step, bucket)
        if bucket is None or not arrays.only_singles:  # what graphs are of; not all are where records do not fit
            self._ops.run(arrays.rows)
        else:
            self._graphs.run(bucket)

    @property
    def hidden(self) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._last.data[: self._rows].cpu().numpy()
        return found


class _Bound(_Body):
    """A recorded network: also the programs of the head and of the states."""

    def __init__(self, layers: Layers, heads: tuple[Head, Head | None], cache: PagedCache, limits: StepLimits) -> None:
        super().__init__(layers, cache, limits)
        head, states = heads
        self._logits = _Tail(CudaOps(self._memory, LOGIT_ROWS), head, self._last)
        self._states = self._logits
        if states is not None:
            self._states = _Tail(CudaOps(self._memory, LOGIT_ROWS), states, self._last)
        self._sampler = Sampler(self._logits.out.shape[1], LOGIT_ROWS)
        self._num_logits = 0

    def logits(self, rows: IntArray) -> NDArray[np.float32]:
        self._choose(rows)
        return self.last_logits

    def states(self, rows: IntArray) -> NDArray[np.float32]:
        self._states.run(rows)
        found: NDArray[np.float32] = self._states.out[: len(rows)].cpu().numpy()
        return found

    def sample(self, rows: IntArray, how: SampleRows) -> IntArray:
        self._choose(rows)
        return self._sampler.sample(self._logits.out, how)

    @property
    def last_logits(self) -> NDArray[np.float32]:
        return self._sampler.to_host(self._logits.out, self._num_logits)

    def _choose(self, rows: IntArray) -> None:
        self._num_logits = len(rows)
        self._logits.run(rows)


class _Tail:
    """What is read from the hidden state: its program, and the rows it leaves."""

    def __init__(self, ops: CudaOps, head: Head, hidden: Rows) -> None:
        self._ops, self._rows = ops, head(ops, hidden)
        ops.finish()
        self._index = torch.zeros(LOGIT_ROWS, dtype=torch.int32, pin_memory=on_gpu())  # may be copied without a wait
        self.out: Tensor = self._rows.data
        self._graphs = Graphs(ops.run, buckets_up_to(LOGIT_ROWS), lambda bucket: None)

    def run(self, rows: IntArray) -> None:
        """For these rows of the last step."""
        bucket = self._graphs.bucket(len(rows))
        assert bucket is not None, "at most LOGIT_ROWS"
        self._index.numpy()[: len(rows)] = rows
        self._ops.index.copy_(self._index, non_blocking=True)
        self._graphs.run(bucket)


def _nothing(groups: int) -> StepInput:
    """A step without rows."""
    none = np.zeros(0, np.int32)
    return StepInput(none, none, np.zeros(1, np.int32), none, np.zeros((groups, 0, 1), np.int32))
