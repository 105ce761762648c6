"""A step as arrays: buffers made once, filled anew by each step."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Row

import numpy as np

from shoal.engine.masks import Masks
from shoal.engine.sampling_state import Mask, RowNeeds, SamplingState
from shoal.engine.scheduler import StepBatch
from shoal.engine.sequence import Sequence
from shoal.kernels.base import IntArray, SampleRows, StepInput, StepLimits
from shoal.kernels.samplers import Sampler

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
            if batch.num_drafted:
                token_ids += seq.draft
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
    """How the rows of a step are sampled: one array element for each token that a sequence may get."""

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
        # Of all rows, None where no row needs any.
        self._mask: list[Mask | None] | None = None
        self._samplers: list[tuple[Sampler, ...] | None] | None = None
        self._surprise = np.zeros(max_seqs, np.float32)
        self._special: list[tuple[int, Sequence]] = []  # rows that need more than numbers
        self._ahead: list[int] | None = (
            None  # how many drafted tokens come before the one that is sampled; None: none anywhere
        )
        self._held: list[Sequence] = []  # whose parameters the buffers hold: mostly the same as the step before

    def fill(self, sequences: list[Sequence], masks: Masks | None = None, ahead: list[int] | None = None) -> None:
        """Take in the sequences that get a token from this step, and the masks of those that are constrained.

        With drafts a sequence is there once for each token, and ``ahead`` says how many tokens of its draft come before it.
        """
        count = len(sequences)
        self._ahead = ahead
        if ahead is None:
            self._rows[:count] = [seq.first_row + seq.num_scheduled - 1 for seq in sequences]
            self._position[:count] = [len(seq.token_ids) for seq in sequences]
            self._banned = [self._stop_ids(seq) if seq.must_not_stop() else None for seq in sequences]
        else:
            self._place_ahead(sequences, ahead)
        if sequences != self._held:
            self._held = []  # should this raise, the buffers hold nobody's
            self._fill_parameters(sequences)
            self._held = sequences
        self._mask = self._samplers = None
        if self._special:
            self._fill_special(count)
        if masks is not None:
            own = self._mask or [None] * count
            self._mask = [_both(*pair) for pair in zip(own, masks, strict=True)]

    def _place_ahead(self, sequences: list[Sequence], ahead: list[int]) -> None:
        places = list(zip(sequences, ahead, strict=True))
        count = len(places)
        self._rows[:count] = [seq.row_of(len(seq.token_ids) - 1 + further) for seq, further in places]
        self._position[:count] = [len(seq.token_ids) + further for seq, further in places]
        self._banned = [self._stop_ids(seq) if seq.must_not_stop(further) else None for seq, further in places]

    def take_surprise(self, start: int, stop: int) -> None:
        """Let the sequences of a block know by how much their tokens have surprised, once they are sampled."""
        for row, seq in self._special:
            if start <= row < stop:
                seq.sampling.surprised(len(seq.token_ids), float(self._surprise[row]))

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
            mask=None if self._mask is None else self._mask[part],
            samplers=None if self._samplers is None else self._samplers[part],
            surprise=self._surprise[part] if self._special else None,
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
        self._special = [(row, seq) for row, seq in enumerate(sequences) if not self._state(seq).is_plain]
        for row, seq in self._special:
            if not seq.sampling.draws_plainly:  # its samplers do all that comes before the draw
                greedy = seq.request.params.greedy
                self._temperature[row], self._top_k[row] = 0.0 if greedy else 1.0, 0
                self._top_p[row], self._min_p[row] = 1.0, 0.0

    def _state(self, seq: Sequence) -> SamplingState:
        if seq.sampling is None:
            seq.sampling = SamplingState(seq.request, seq.max_len, self._vocab_size)
        state: SamplingState = seq.sampling
        return state

    def _fill_special(self, count: int) -> None:
        mask: list[Mask | None] = [None] * count
        samplers: list[tuple[Sampler, ...] | None] = [None] * count
        for row, needs in self._needs():
            mask[row], banned, samplers[row] = needs
            if banned is not None:
                stop_ids = self._banned[row]
                self._banned[row] = banned if stop_ids is None else np.concatenate([stop_ids, banned])
        self._mask = mask if any(words is not None for words in mask) else None
        self._samplers = samplers if any(samplers) else None

    def _needs(self) -> Iterator[tuple[int, RowNeeds]]:
        """What each special row needs. Rows of a draft, which follow their sequence's own, get theirs from copies of its state."""
        for row, seq in self._special:
            ahead = self._ahead[row] if self._ahead else 0
            if ahead == 0:
                state = self._state(seq)
                yield row, state.needs(seq.token_ids)
            else:
                state = state.copy()
                yield row, state.needs(seq.token_ids + seq.draft[:ahead])

    def _stop_ids(self, seq: Sequence) -> IntArray:
        """The ids that would end the sequence, as far as the model has them."""
        return np.array(sorted(i for i in seq.stop_ids if i < self._vocab_size), np.int32)


def _both(one: Mask | None, other: Mask | None) -> Mask | None:
    """What two masks allow."""
    if one is None or other is None:
        return other if one is None else one
    return one & other
