"""A step as arrays: buffers made once, filled anew by each step."""

from __future__ import annotations

from collections.abc import Sequence as Row

import numpy as np

from shoal.engine.masks import Masks
from shoal.engine.scheduler import StepBatch
from shoal.engine.sequence import Sequence
from shoal.kernels.base import IntArray, SampleRows, StepInput, StepLimits

_UINT64 = 2**64 - 1


class StepArrays:
    """What the network reads of a step. The arrays that ``fill`` returns are views, valid until it is called again."""

    def __init__(self, limits: StepLimits, num_groups: int) -> None:
        self._token_ids = np.zeros(limits.max_rows, np.int32)
        self._positions = np.zeros(limits.max_rows, np.int32)
        self._row_start = np.zeros(limits.max_seqs + 1, np.int32)
        self._kv_len = np.zeros(limits.max_seqs, np.int32)
        self._page_table = np.zeros((num_groups, limits.max_seqs, limits.max_pages_per_seq), np.int32)
        # Which page lists the rows of the tables hold, and how much of them: most steps change nothing there.
        self._written: list[tuple[Row[Row[int]], int]] = [((), 0)] * limits.max_seqs

    def fill(self, batch: StepBatch) -> StepInput:
        """The arrays of one step."""
        token_ids: list[int] = []
        positions: list[int] = []
        row_start, kv_len = [0], []
        for index, seq in enumerate(batch.sequences):
            start = seq.num_computed
            stop = start + seq.num_scheduled
            token_ids += seq.token_ids[start:stop]
            positions += range(start, stop)
            row_start.append(len(token_ids))
            kv_len.append(stop)
            self._write_pages(index, seq.pages)
        rows, seqs = len(token_ids), len(kv_len)
        self._token_ids[:rows] = token_ids
        self._positions[:rows] = positions
        self._row_start[: seqs + 1] = row_start
        self._kv_len[:seqs] = kv_len
        return StepInput(
            token_ids=self._token_ids[:rows],
            positions=self._positions[:rows],
            row_start=self._row_start[: seqs + 1],
            kv_len=self._kv_len[:seqs],
            page_table=self._page_table[:, :seqs],
        )

    def _write_pages(self, index: int, pages: list[list[int]]) -> None:
        """Bring one sequence's rows up to date. The same lists, all of one length, can only have grown since they were last written."""
        held, count = self._written[index]
        if held is not pages:
            count = 0
        stop = len(pages[0])
        if count < stop:
            for group, ids in enumerate(pages):
                self._page_table[group, index, count:stop] = ids[count:]
            self._written[index] = (pages, stop)


class SampleArrays:
    """How the rows of a step are sampled: one array element for each sequence that gets a token."""

    def __init__(self, max_seqs: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._rows = np.zeros(max_seqs, np.int32)
        self._temperature = np.zeros(max_seqs, np.float32)
        self._top_k = np.zeros(max_seqs, np.int32)
        self._top_p = np.zeros(max_seqs, np.float32)
        self._min_p = np.zeros(max_seqs, np.float32)
        self._seed = np.zeros(max_seqs, np.uint64)
        self._sample = np.zeros(max_seqs, np.uint32)
        self._position = np.zeros(max_seqs, np.uint32)
        self._banned: list[IntArray | None] = []
        self._masks: Masks | None = None
        self._held: list[Sequence] = []  # whose parameters the buffers hold: mostly the same as the step before

    def fill(self, sequences: list[Sequence], masks: Masks | None = None) -> None:
        """Take in the sequences that get a token from this step, and the masks of those that are constrained."""
        count = len(sequences)
        self._masks = masks
        self._rows[:count] = [seq.first_row + seq.num_scheduled - 1 for seq in sequences]
        self._position[:count] = [len(seq.token_ids) for seq in sequences]
        self._banned = [self._stop_ids(seq) if seq.must_not_stop else None for seq in sequences]
        if sequences != self._held:
            self._held = []  # should this raise, the buffers hold nobody's
            self._fill_parameters(sequences)
            self._held = sequences

    def block(self, start: int, stop: int) -> tuple[IntArray, SampleRows]:
        """Rows of the step and how to sample them, for some of the sequences; views, valid until the next ``fill``."""
        part = slice(start, stop)
        return self._rows[part], SampleRows(
            temperature=self._temperature[part],
            top_k=self._top_k[part],
            top_p=self._top_p[part],
            min_p=self._min_p[part],
            seed=self._seed[part],
            sample=self._sample[part],
            position=self._position[part],
            banned=self._banned[part],
            mask=None if self._masks is None else self._masks[part],
        )

    def _fill_parameters(self, sequences: list[Sequence]) -> None:
        count = len(sequences)
        params = [seq.request.params for seq in sequences]
        self._temperature[:count] = [p.temperature for p in params]
        self._top_k[:count] = [max(0, p.top_k) for p in params]
        self._top_p[:count] = [p.top_p for p in params]
        self._min_p[:count] = [p.min_p for p in params]
        self._seed[:count] = [seq.request.seed & _UINT64 for seq in sequences]
        self._sample[:count] = [seq.request.sample + seq.sample for seq in sequences]

    def _stop_ids(self, seq: Sequence) -> IntArray:
        """The ids that would end the sequence, as far as the model has them."""
        return np.array(sorted(i for i in seq.stop_ids if i < self._vocab_size), np.int32)
