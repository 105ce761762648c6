"""A token for each row of logits, on the device: masks and samplers first, where rows have any, then the draw.

A batch whose rows are all greedy takes two launches, one that draws three. The host waits once, for the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.kernels.base import IntArray, SampleRows
from shoal.kernels.cuda.launch import Tensor, device, launch, on_gpu
from shoal.kernels.cuda.sample_draw import (
    GREEDY,
    PLAIN,
    RANKED,
    ban_ids,
    choose,
    copy_scores,
    measure_surprise,
    weigh_chunk,
)
from shoal.kernels.cuda.sample_row import BLOCK, CHANGED, CHUNK, CHUNK_WARPS, DRAW_WARPS, PARAMS
from shoal.kernels.cuda.sample_space import Space, Staging, pinned
from shoal.kernels.cuda.samplers import ENTRIES, Step, entries, sampler_steps
from shoal.kernels.samplers import Mirostat

_LISTS = 1 << 16  # bytes that are there for lists of ids before more are asked for


class Sampler:
    """Samples from at most ``max_rows`` rows. `set`, `run` and `tokens` follow one another; `sample` is all three."""

    def __init__(self, vocab: int, max_rows: int) -> None:
        self._vocab, self._words = vocab, -(-vocab // 32)
        self._space = Space(vocab, max_rows)
        self._staging = Staging(4 * max_rows * (PARAMS.value + self._words) + _LISTS)
        # Tokens, then the bits of what they surprise by.
        self._answer = torch.zeros((2, max_rows), dtype=torch.int32, device=device())
        self._answer_host = pinned(2 * max_rows, torch.int32).view(2, max_rows)
        self._logits_host: Tensor | None = None  # few ask for log-probabilities
        self._rows, self._mode = 0, GREEDY.value
        self._steps: list[tuple[Step, Sequence[Tensor]]] = []
        self._surprised: Tensor | None = None

    def sample(self, logits: Tensor, how: SampleRows) -> IntArray:
        """The tokens of the first rows of ``logits`` [.., vocab]; they stay as they are."""
        self.set(how)
        self.run(logits)
        tokens = self.tokens()
        if how.surprise is not None:
            for row in _mirostat_rows(how):
                if tokens[row] >= 0:
                    how.surprise[row] = self.surprise[row]
        return tokens

    def set(self, how: SampleRows) -> None:
        """Send what the rows ask for to the device."""
        self._rows = len(how.temperature)
        self._mode = _mode(how)
        changed = _changed_rows(how)
        steps = self._change_steps(how, changed)
        if how.samplers is not None:
            steps += sampler_steps(how.samplers)
        surprised = _mirostat_rows(how) if how.surprise is not None else []
        arrays = [
            _params(how, changed),
            np.array(surprised, np.int32),
            *(array for step in steps for array in step.arrays),
        ]
        params, rows, *views = self._staging.put(arrays)
        self._space.params, self._surprised = params, rows if surprised else None
        self._steps = []
        for step in steps:
            self._steps.append((step, views[: len(step.arrays)]))
            views = views[len(step.arrays) :]

    def run(self, logits: Tensor) -> None:
        """Launch all that chooses the tokens."""
        space = self._space
        space.logits = logits
        for step, arrays in self._steps:
            step.apply(space, arrays)
        space.best(space.every_row[: self._rows], clear=self._mode == RANKED.value)
        self._choose()
        if self._surprised is not None:
            space.sum(self._surprised)
            launch(
                measure_surprise, (len(self._surprised),), self._surprised, self._answer[0], self._answer[1].view(torch.float32),
                space.scratch, space.bests, space.firsts, space.sums, **space.sizes,
            )  # fmt: skip

    def tokens(self) -> IntArray:
        """The tokens, int32 [rows], -1 where there is none; waits for them. `surprise` is there too."""
        self._answer_host.copy_(self._answer, non_blocking=True)
        _wait()
        found: IntArray = self._answer_host[0, : self._rows].numpy().copy()
        return found

    @property
    def surprise(self) -> NDArray[np.float32]:
        """After `tokens`: by how many bits those of rows with Mirostat surprise, float32 [rows]."""
        found: NDArray[np.float32] = self._answer_host[1, : self._rows].numpy().view(np.float32)
        return found

    def to_host(self, logits: Tensor, rows: int) -> NDArray[np.float32]:
        """The first rows of logits, for log-probabilities; waits for them. Valid until the next call."""
        if self._logits_host is None:
            self._logits_host = pinned(self._answer.shape[1] * self._vocab, torch.float32).view(-1, self._vocab)
        self._logits_host[:rows].copy_(logits[:rows], non_blocking=True)
        _wait()
        found: NDArray[np.float32] = self._logits_host[:rows].numpy()
        return found

    def _choose(self) -> None:
        space = self._space
        scores = (space.params, space.logits, space.scratch, space.logits.stride(0), space.bests, space.firsts)
        bins = (space.sums, space.counts, space.masses)
        sizes = {**space.all_sizes, "CHUNK": CHUNK, "MODE": self._mode}
        if self._mode != GREEDY.value:
            launch(weigh_chunk, (self._rows, space.chunks), *scores, *bins, **sizes, warps=CHUNK_WARPS)
        launch(
            choose, (self._rows,), self._answer[0], *scores, *bins, space.found, space.ids,
            **sizes, BLOCK=BLOCK, warps=DRAW_WARPS,
        )  # fmt: skip

    def _change_steps(self, how: SampleRows, rows: list[int]) -> list[Step]:
        """Copies of some rows, masked and without the banned ids."""
        if not rows:
            return []
        masks = [None if how.mask is None else how.mask[row] for row in rows]
        words = [mask for mask in masks if mask is not None]
        has_mask = np.array([mask is not None for mask in masks])
        which = np.where(has_mask, np.cumsum(has_mask) - 1, -1)
        flat = np.concatenate(words).astype(np.uint32).view(np.int32) if words else np.zeros(0, np.int32)
        steps = [Step(self._copy, [np.array(rows, np.int32), which.astype(np.int32), flat])]
        lists = [(row, ids[(ids >= 0) & (ids < self._vocab)]) for row, ids in enumerate(how.banned) if ids is not None]
        if lists:
            pairs = entries(lists)
            steps.append(Step(partial(self._ban, len(pairs[0])), list(pairs)))
        return steps

    def _copy(self, space: Space, arrays: Sequence[Tensor]) -> None:
        scores = (space.logits, space.scratch, space.logits.stride(0))
        sizes = {"VOCAB": self._vocab, "WIDTH": space.sizes["WIDTH"], "WORDS": self._words, "CHUNK": CHUNK}
        launch(copy_scores, (len(arrays[0]), space.chunks), *arrays, *scores, **sizes, warps=CHUNK_WARPS)

    def _ban(self, size: int, space: Space, arrays: Sequence[Tensor]) -> None:
        launch(ban_ids, (-(-size // ENTRIES),), *arrays, space.scratch, size, WIDTH=space.sizes["WIDTH"], COUNT=ENTRIES)


def _wait() -> None:
    if on_gpu():
        torch.cuda.current_stream().synchronize()


def _mode(how: SampleRows) -> int:
    """What the rows need at most."""
    drawing = how.temperature > 0
    if not drawing.any():
        return GREEDY.value  # type: ignore[no-any-return]
    ranked = drawing & ((how.top_k > 0) | (how.top_p < 1))
    return RANKED.value if ranked.any() else PLAIN.value  # type: ignore[no-any-return]


def _params(how: SampleRows, changed: list[int]) -> NDArray[np.int32]:
    """The rows' parameters as words [rows, PARAMS]."""
    words = np.zeros((len(how.temperature), PARAMS.value), np.int32)
    reals = np.stack([how.temperature, how.top_p, how.min_p], 1).astype(np.float32)
    words[:, [0, 2, 3]] = reals.view(np.int32)
    words[:, 1] = how.top_k
    words[:, 4:6] = how.seed.astype(np.uint64).view(np.int32).reshape(-1, 2)
    words[:, 6] = how.sample.astype(np.uint32).view(np.int32)
    words[:, 7] = how.position.astype(np.uint32).view(np.int32)
    words[changed, CHANGED.value] = 1
    return words


def _changed_rows(how: SampleRows) -> list[int]:
    """Rows that have a mask, banned ids or samplers."""
    extras = [how.banned, how.mask, how.samplers]
    return [
        row for row in range(len(how.temperature)) if any(extra is not None and _some(extra[row]) for extra in extras)
    ]


def _some(extra: object) -> bool:
    return extra is not None and len(extra) > 0  # type: ignore[arg-type]


def _mirostat_rows(how: SampleRows) -> list[int]:
    """Rows whose samplers end with Mirostat."""
    samplers = how.samplers or ()
    return [row for row, own in enumerate(samplers) if own and isinstance(own[-1], Mirostat)]
