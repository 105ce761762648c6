"""The numbers of a step on the device: what rows there are, where their pages lie, and who computes whose attention.

All of it is int32 in one buffer whose addresses never change, so that a recorded graph finds the next step's numbers where it found
the last one's. The host fills a pinned buffer of the same layout and copies as much of it as is used; it has two of these in turn,
to prepare a step while the one before still runs.

    table_stride | token_ids | positions | row_seq | kv_len | singles | shorts   | chunks | page_table
    1              max_rows    max_rows    max_rows  seqs+1   rows x 4  seqs x 4   x 4      the rest, as far as it is used

A step may be padded to a number of rows that a graph was recorded for. Rows that pad belong to one more sequence, which holds
nothing and whose only page is the scratch page of each KV group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.kernels.base import PAGE_SIZE, StepInput, StepLimits
from shoal.kernels.cuda.launch import Tensor, device, on_gpu
from shoal.kernels.reference import PIECE

CHUNK_ROWS = 64  # most rows of a chunk
SHORT_ROWS = 8  # most rows of a short one

Ints = NDArray[np.int32]


@dataclass(slots=True)
class StepArrays:
    """A step on the device; tensors are int32 and have room for the largest step. The counts say how much of it is used.

    ``singles``, ``shorts`` and ``chunks`` list the work of attention as (sequence, first row, rows, first record): all rows of
    sequences that have one in this step, or up to SHORT_ROWS, and up to CHUNK_ROWS neighbouring rows of others. Pieces of the KV of
    singles and shorts leave records in a workspace, one for each row, from the given one on; -1 where there is one piece at most,
    which needs none. Those without room for their records are chunks.
    """

    token_ids: Tensor  # [max_rows]
    positions: Tensor  # [max_rows]
    row_seq: Tensor  # [max_rows], each row's sequence
    kv_len: Tensor  # [max_seqs + 1]
    table_stride: Tensor  # [1], pages in a row of the page table
    page_table: Tensor  # flat: sequence s has pages from (s * groups + group) * table_stride on
    singles: Tensor  # [max_rows, 4]
    shorts: Tensor  # [max_seqs, 4]
    chunks: Tensor  # [max_chunks, 4]
    groups: int
    max_pieces: int  # of the longest sequence there may be
    rows: int = 0  # with those that pad
    num_singles: int = 0  # with those that pad
    num_shorts: int = 0
    num_chunks: int = 0

    @property
    def only_singles(self) -> bool:
        """Whether the number of rows says how much work there is of each kind."""
        return self.num_shorts == self.num_chunks == 0


class StagedStep:
    """Where steps within ``limits`` are put on their way to the device. ``scratch_pages`` holds one page of each KV group, where rows
    that pad store; the workspace of attention has ``records`` records (attention.py), which may be set before the first step."""

    def __init__(self, limits: StepLimits, scratch_pages: Sequence[int], records: int = 0) -> None:
        self._scratch = np.array(scratch_pages, np.int32)
        self.records = records
        layout = _layout(limits, len(scratch_pages))
        self._used_before_table = sum(layout.values()) - layout["page_table"]
        self._device = torch.zeros(sum(layout.values()), dtype=torch.int32, device=device())
        self._turns = cycle([_Host(layout), _Host(layout)])
        of = dict(zip(layout, self._device.split(list(layout.values())), strict=True))
        of |= {name: of[name].view(-1, 4) for name in ("singles", "shorts", "chunks")}
        self.arrays = StepArrays(**of, groups=len(scratch_pages), max_pieces=_pieces(limits))

    def set(self, step: StepInput, bucket: int | None = None) -> StepArrays:
        """Bring a step to the device, padded to ``bucket`` rows: the same arrays each time, with other numbers. The copy runs in the
        order of the current stream."""
        host, arrays = next(self._turns), self.arrays
        host.wait()
        arrays.rows = bucket or len(step.token_ids)
        _set_rows(host.of, step, arrays.rows)
        used = self._used_before_table + _set_pages(host.of, step, self._scratch)
        singles, shorts, chunks = plan(step, arrays.rows, self.records)
        arrays.num_singles, arrays.num_shorts, arrays.num_chunks = len(singles), len(shorts), len(chunks)
        for name, items in (("singles", singles), ("shorts", shorts), ("chunks", chunks)):
            host.of[name][: items.size] = items.ravel()
        self._device[:used].copy_(host.pinned[:used], non_blocking=True)
        host.sent()
        return arrays


class _Host:
    """A buffer on the host, by its fields; pinned, so that the device can read it while the host goes on."""

    def __init__(self, layout: dict[str, int]) -> None:
        self.pinned = torch.zeros(sum(layout.values()), dtype=torch.int32, pin_memory=on_gpu())
        ends = list(accumulate(layout.values()))
        self.of: dict[str, Ints] = dict(zip(layout, np.split(self.pinned.numpy(), ends[:-1]), strict=True))
        self._read = torch.cuda.Event() if on_gpu() else None

    def wait(self) -> None:
        """Until the device has read what was put here last."""
        if self._read is not None:
            self._read.synchronize()

    def sent(self) -> None:
        """The copy is under way."""
        if self._read is not None:
            self._read.record()


def _layout(limits: StepLimits, groups: int) -> dict[str, int]:
    """Fields in their order, with their sizes."""
    rows, seqs = limits.max_rows, limits.max_seqs + 1
    most_chunks = rows // CHUNK_ROWS + limits.max_seqs
    sizes = {"token_ids": rows, "positions": rows, "row_seq": rows, "kv_len": seqs}
    lists = {"singles": 4 * rows, "shorts": 4 * limits.max_seqs, "chunks": 4 * most_chunks}
    table = {"page_table": groups * seqs * limits.max_pages_per_seq}
    return {"table_stride": 1, **sizes, **lists, **table}


def _pieces(limits: StepLimits) -> int:
    return -(-limits.max_pages_per_seq * PAGE_SIZE // PIECE)


def _set_rows(of: dict[str, Ints], step: StepInput, rows: int) -> None:
    real, seqs = len(step.token_ids), len(step.kv_len)
    for name, values, padding in (
        ("token_ids", step.token_ids, 0),
        ("positions", step.positions, 0),
        ("row_seq", np.repeat(np.arange(seqs), np.diff(step.row_start)), seqs),
    ):
        of[name][:real] = values
        of[name][real:rows] = padding
    of["kv_len"][:seqs] = step.kv_len
    of["kv_len"][seqs] = 0


def _set_pages(of: dict[str, Ints], step: StepInput, scratch: Ints) -> int:
    """Page tables side by side, as long as the longest that is in use. Returns how much of the field that takes."""
    groups, seqs, _ = step.page_table.shape
    stride = max(1, -(-int(step.kv_len.max(initial=0)) // PAGE_SIZE))
    used: int = (seqs + 1) * groups * stride
    table = of["page_table"][:used].reshape(seqs + 1, groups, stride)
    table[:seqs] = step.page_table[:, :, :stride].transpose(1, 0, 2)
    table[seqs] = scratch[:, None]
    of["table_stride"][0] = stride
    return used


def plan(step: StepInput, rows: int, records: int) -> tuple[Ints, Ints, Ints]:
    """The lists of attention's work, [n, 4] each: singles, of which those of rows that pad come last; shorts; chunks."""
    counts, real, seqs = np.diff(step.row_start), len(step.token_ids), len(step.kv_len)
    pieces = -(-step.kv_len // PIECE)
    few = (counts > 0) & (counts <= SHORT_ROWS)
    wanted = np.where(few & (pieces > 1), pieces * counts, 0)
    ends = np.cumsum(wanted)
    first_record = np.where(wanted > 0, ends - wanted, -1)
    placed = few & (ends * (wanted > 0) <= records)

    alone, short = np.flatnonzero(placed & (counts == 1)), np.flatnonzero(placed & (counts > 1))
    real_singles = _items(alone, step.row_start[alone], 1, first_record[alone])
    padding = _items(np.full(rows - real, seqs), np.arange(real, rows), 1, -1)
    shorts = _items(short, step.row_start[short], counts[short], first_record[short])
    return np.concatenate([real_singles, padding]), shorts, _chunks(step, np.flatnonzero(~placed & (counts > 0)))


def _chunks(step: StepInput, sequences: NDArray[np.int64]) -> Ints:
    """All rows of some sequences."""
    per_sequence = -(-np.diff(step.row_start)[sequences] // CHUNK_ROWS)
    sequence = np.repeat(sequences, per_sequence)
    index = np.arange(len(sequence)) - np.repeat(np.cumsum(per_sequence) - per_sequence, per_sequence)
    first = step.row_start[sequence] + index * CHUNK_ROWS
    return _items(sequence, first, np.minimum(CHUNK_ROWS, step.row_start[sequence + 1] - first), -1)


def _items(sequence: NDArray[np.int64], *columns: NDArray[np.int64] | Ints | int) -> Ints:
    items = np.empty((len(sequence), 4), np.int32)
    for i, column in enumerate((sequence, *columns)):
        items[:, i] = column
    return items
