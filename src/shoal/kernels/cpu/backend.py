"""The CPU backend: packs weights, records the network as a program of kernels, and runs it on the pool.

Binding calls the network once with `CPUOps`, whose operations allocate workspace and append to a program instead of computing.
A step then sets a few numbers in the step header and runs the program: one call from Python for all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from shoal.errors import MemoryLimitError, UnsupportedError
from shoal.gguf.quants import QuantFormat
from shoal.kernels.base import (
    LOGIT_ROWS,
    PAGE_SIZE,
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
from shoal.kernels.cpu import attention, sample, sample_row, sample_steps
from shoal.kernels.cpu.arena import Arena
from shoal.kernels.cpu.isa import ISA
from shoal.kernels.cpu.jit import Lazy
from shoal.kernels.cpu.ops import CPUOps
from shoal.kernels.cpu.pack import LAYOUTS, PackedMatrix, pack_matrix
from shoal.kernels.cpu.paged import PagedCache
from shoal.kernels.cpu.pool import CHUNKS_PER_THREAD, Pool, program
from shoal.kernels.cpu.recording import LINE, Rows, address_of, padded
from shoal.kernels.cpu.together import compile_together


class CPUBackend:
    """Numba kernels on ``threads`` threads."""

    name = "cpu"

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.pool = Pool(self.threads)
        self._arena = Arena()

    def describe(self) -> str:
        """Instruction set, threads, how work is shared."""
        return f"cpu: Numba kernels, {ISA}, {self.threads} threads (own pool)"

    def supports(self, format: QuantFormat) -> bool:
        """Whether there is a layout for it."""
        return format.name in LAYOUTS

    def matrix(self, parts: Sequence[RawTensor]) -> PackedMatrix:
        """Strips of 16 rows (see pack.py)."""
        return pack_matrix(list(parts), self._arena)

    def vector(self, tensor: RawTensor) -> NDArray[np.float32]:
        """float32, padded to whole registers."""
        values = tensor.dequantised()
        out = np.zeros(padded(len(values)), np.float32)
        out[: len(values)] = values
        return out

    def kv_token_bytes(self, kv_heads: int, head_dim: int, dtype: str) -> int:
        """Head sizes are rounded up to whole registers; q8_0 has scales beside its values."""
        return 2 * kv_heads * attention.STORAGE[dtype].unit_bytes(head_dim) // PAGE_SIZE

    def kv_cache(self, groups: Sequence[KVGroup], shape: AttentionShape, dtype: str) -> PagedCache:
        """Zeroed pages; the system gives memory for a page when it is first written."""
        if shape.head_dim > attention.MAX_HEAD_DIM:
            raise UnsupportedError(f"head size {shape.head_dim}: at most {attention.MAX_HEAD_DIM} on {self.name}")
        page_bytes = PAGE_SIZE * self.kv_token_bytes(shape.kv_heads, shape.head_dim, dtype) // 2
        group_of, start, total = {}, {}, 0
        for index, group in enumerate(groups):
            for layer in group.layers:
                group_of[layer], start[layer] = index, total
                total += group.pages * page_bytes
        try:
            k, v = (np.zeros(total + LINE, np.uint8) for _ in range(2))
        except MemoryError:
            raise MemoryLimitError(f"KV cache: {2 * total} bytes are not available") from None
        return PagedCache(k, v, dtype, group_of, start, page_bytes)

    def copy_pages(self, cache: PagedCache, group: int, pairs: Sequence[tuple[int, int]]) -> None:
        """A plain copy of bytes."""
        cache.copy(group, pairs)

    def bind(
        self, layers: Layers, head: Head, cache: PagedCache, limits: StepLimits, states: Head | None = None
    ) -> BoundNetwork:
        """Record the programs and compile what they use."""
        bound = _Bound(self, layers, (head, states), cache, limits)
        bound.compile()
        return bound

    def bind_layers(self, layers: Layers, cache: PagedCache, limits: StepLimits) -> BoundLayers:
        """The same without a head."""
        body = _Body(self, layers, cache, limits)
        body.compile()
        return body

    def owners(self, tensor: str) -> tuple[Backend, ...]:
        """All of it."""
        return (self,)

    def memory_room(self) -> None:
        """The machine's."""

    def close(self) -> None:
        """Stop the workers."""
        self.pool.close()


class _Body:
    """Recorded layers: the step header, their program, the rows they begin with if those come from elsewhere, the rows they leave."""

    def __init__(self, backend: CPUBackend, layers: Layers, cache: PagedCache, limits: StepLimits) -> None:
        self._pool, self._threads = backend.pool, backend.threads
        self._step = np.zeros(attention.STEP_FIELDS, np.int64)
        body = CPUOps(backend.threads, cache, self._step, address_of(self._step), limits)
        self._last = layers(body)
        self._recorders = [body]  # their memory is the programs'
        self._layers = np.zeros(0, np.int64)
        self._hidden = _view(self._last, body)
        self._inbox = None if body.inbox is None else _view(body.inbox, body)
        self.hidden: NDArray[np.float32] = self._hidden[:0]

    def compile(self) -> None:
        """Make programs of what was recorded."""
        compile_together(self._kernels(), self._threads)
        self._layers = self._recorders[0].program()

    def _kernels(self) -> list[Lazy]:
        return [kernel for recorder in self._recorders for kernel, _, _ in recorder.ops]

    def receive(self, rows: NDArray[np.float32]) -> None:
        assert self._inbox is not None, "these layers begin with an embedding"
        self._inbox[: len(rows)] = rows

    def layers(self, step: StepInput) -> None:
        header, rows = self._step, len(step.token_ids)
        self._set_rows(header, rows)
        self.hidden = self._hidden[:rows]
        header[attention.SEQS // 8] = len(step.kv_len)
        header[attention.TOKENS // 8] = address_of(step.token_ids)
        header[attention.POSITIONS // 8] = address_of(step.positions)
        header[attention.ROW_START // 8] = address_of(step.row_start)
        header[attention.KV_LEN // 8] = address_of(step.kv_len)
        header[attention.PAGE_TABLE // 8] = address_of(step.page_table)
        header[attention.GROUP_STRIDE // 8], header[attention.SEQUENCE_STRIDE // 8] = step.page_table.strides[:2]
        self._pool.run(self._layers)

    def _set_rows(self, space: NDArray[np.int64], rows: int) -> None:
        per_chunk = max(1, rows // (self._threads * CHUNKS_PER_THREAD))
        space[:3] = rows, per_chunk, -(-rows // per_chunk)


class _Bound(_Body):
    """A recorded network: also the programs of the head and of the states."""

    def __init__(
        self,
        backend: CPUBackend,
        layers: Layers,
        heads: tuple[Head, Head | None],
        cache: PagedCache,
        limits: StepLimits,
    ) -> None:
        super().__init__(backend, layers, cache, limits)
        self._logit_space = np.zeros(3, np.int64)
        head, states = heads

        def recorder() -> CPUOps:
            space, few = address_of(self._logit_space), replace(limits, max_rows=LOGIT_ROWS)
            return CPUOps(backend.threads, cache, self._step, space, few)

        self._logits = _Tail(recorder(), head, self._last)
        self._states = self._logits if states is None else _Tail(recorder(), states, self._last)
        self._recorders += [self._logits.recorder, self._states.recorder]
        self._sampler = _Sampler(backend, self._logits.rows, address_of(self._logit_space))
        self._head_and_sample = np.zeros(0, np.int64)
        self.last_logits: NDArray[np.float32] = self._logits.rows[:0]

    def compile(self) -> None:
        compile_together([*self._kernels(), sample.sample], self._threads)
        super().compile()
        self._logits.program = self._logits.recorder.program()
        self._states.program = self._states.recorder.program()
        self._head_and_sample = np.concatenate([self._logits.program, self._sampler.program()])

    def logits(self, rows: IntArray) -> NDArray[np.float32]:
        self.last_logits = self._choose(self._logits, rows)
        self._pool.run(self._logits.program)
        return self.last_logits

    def states(self, rows: IntArray) -> NDArray[np.float32]:
        found = self._choose(self._states, rows)
        self._pool.run(self._states.program)
        return found

    def sample(self, rows: IntArray, how: SampleRows) -> IntArray:
        self.last_logits = self._choose(self._logits, rows)
        self._sampler.set(how)
        self._pool.run(self._head_and_sample)
        self._sampler.report(how)
        return self._sampler.tokens[: len(rows)].copy()

    def _choose(self, tail: _Tail, rows: IntArray) -> NDArray[np.float32]:
        """Where the program of ``tail`` will leave what it makes of some rows."""
        tail.index[: len(rows)] = rows
        self._set_rows(self._logit_space, len(rows))
        return tail.rows[: len(rows)]


class _Tail:
    """What is read from the hidden state: its program (once there is one), the row numbers it is for, and the rows it leaves."""

    def __init__(self, recorder: CPUOps, head: Head, hidden: Rows) -> None:
        out = head(recorder, hidden)
        self.recorder, self.index, self.rows = recorder, recorder.logit_index, _view(out, recorder)
        self.program = np.zeros(0, np.int64)


def _view(rows: Rows, recorder: CPUOps) -> NDArray[np.float32]:
    """The recorder's buffer that ``rows`` lie in, as [max_rows, width]."""
    memory, count = next(array for array in recorder.keep if address_of(array) == rows.address), recorder.max_rows
    whole: NDArray[np.float32] = memory[: count * rows.stride].view(np.float32).reshape(count, -1)
    return whole[:, : rows.width]


class _Sampler:
    """The last operation of the head: one token for each row of logits."""

    def __init__(self, backend: CPUBackend, logits: NDArray[np.float32], space: int) -> None:
        self.tokens = np.zeros(LOGIT_ROWS, np.int32)
        self._temperature, self._top_p, self._min_p = (np.zeros(LOGIT_ROWS, np.float32) for _ in range(3))
        self._top_k = np.zeros(LOGIT_ROWS, np.int32)
        self._seed = np.zeros(LOGIT_ROWS, np.uint64)
        self._sample, self._position = (np.zeros(LOGIT_ROWS, np.uint32) for _ in range(2))
        self._banned_start = np.zeros(LOGIT_ROWS + 1, np.int32)
        self._banned = np.zeros(1, np.int32)
        self._banned_address = np.array([address_of(self._banned)], np.int64)
        self._mask = np.zeros(LOGIT_ROWS, np.int64)
        self._samplers_start = np.zeros(LOGIT_ROWS + 1, np.int32)
        self._samplers_address = np.zeros(1, np.int64)
        self._surprise = np.zeros(LOGIT_ROWS, np.float32)
        self._masked = self._sampled = False  # whether any row of the last call had a mask, or samplers
        self._held: list[object] = []  # what the addresses point to
        vocab = logits.shape[1]
        scratch = -(-sample_row.scratch_bytes(vocab) // LINE) * LINE
        self._scratch = np.zeros(backend.threads * scratch + LINE, np.uint8)
        self._count = np.array([backend.threads], np.int64)
        self._args = np.array(
            [
                space,
                backend.threads,
                address_of(logits),
                logits.strides[0],
                vocab,
                address_of(self._temperature),
                address_of(self._top_k),
                address_of(self._top_p),
                address_of(self._min_p),
                address_of(self._seed),
                address_of(self._sample),
                address_of(self._position),
                address_of(self._banned_start),
                address_of(self._banned_address),
                address_of(self._mask),
                address_of(self._samplers_start),
                address_of(self._samplers_address),
                0,  # the samplers' kernels are compiled when a row has some
                0,
                address_of(self._surprise),
                address_of(self.tokens),
                address_of(self._scratch),
                scratch,
            ],
            np.int64,
        )

    def set(self, how: SampleRows) -> None:
        """Take over the rows' parameters."""
        n = len(how.temperature)
        self._temperature[:n], self._top_p[:n], self._min_p[:n] = how.temperature, how.top_p, how.min_p
        self._top_k[:n], self._seed[:n] = how.top_k, how.seed
        self._sample[:n], self._position[:n] = how.sample, how.position
        if any(ids is not None for ids in how.banned):
            ids = [np.zeros(0, np.int32) if b is None else b for b in how.banned]
            self._banned = np.concatenate(ids).astype(np.int32)
            self._banned_start[1 : n + 1] = np.cumsum([len(b) for b in ids])
            self._banned_address[0] = address_of(self._banned)
        else:
            self._banned_start[:] = 0
        if self._masked or self._sampled or how.mask is not None or how.samplers is not None:
            self._set_special(how)

    def _set_special(self, how: SampleRows) -> None:
        """Take over masks and samplers, or the lack of them."""
        n, self._held = len(how.temperature), []
        self._masked, self._sampled = how.mask is not None, how.samplers is not None
        self._mask[:] = 0  # of all rows: the next call may have more and need none of this
        if how.mask is not None:
            masks = [None if mask is None else np.ascontiguousarray(mask) for mask in how.mask]
            self._mask[:n] = [0 if mask is None else address_of(mask) for mask in masks]
            self._held.append(masks)
        self._samplers_start[:] = 0
        if how.samplers is not None:
            self._args[sample_row.ADJUST // 8] = sample_steps.adjust_row.address
            self._args[sample_row.MEASURE // 8] = sample_steps.measure_row.address
            records = sample_steps.Records(how.samplers)
            self._held.append(records)
            self._samplers_start[: n + 1] = records.starts
            self._samplers_address[0] = address_of(records.records)

    def report(self, how: SampleRows) -> None:
        """Hand over what was found besides the tokens."""
        if how.surprise is not None:
            how.surprise[:] = self._surprise[: len(how.surprise)]

    def program(self) -> NDArray[np.int64]:
        """One operation: thread by thread, so that each has scratch memory of its own."""
        return program([(sample.sample.address, address_of(self._args), address_of(self._count))])
