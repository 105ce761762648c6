"""The sampler: a token for each sequence whose last known token was computed; log-probabilities of it and of prompts."""

from __future__ import annotations

from collections.abc import Sequence as Row

import numpy as np
from numpy.typing import NDArray

from shoal.engine.masks import Masks
from shoal.engine.sequence import Sequence, TokenLogprobs
from shoal.engine.step import SampleArrays
from shoal.kernels.base import LOGIT_ROWS, BoundNetwork


class Sampler:
    """Chooses tokens from the hidden states that ``network`` holds after a step."""

    def __init__(self, network: BoundNetwork, vocab_size: int, max_seqs: int) -> None:
        self._network = network
        self._arrays = SampleArrays(max_seqs, vocab_size)

    def sample(
        self, sequences: list[Sequence], ahead: list[int] | None = None, masks: Masks | None = None
    ) -> tuple[list[int], list[TokenLogprobs | None]]:
        """For each sequence its next token (-1: its logits hold NaN or leave none) and what ``logprobs`` asks for.

        ``ahead`` as in ``SampleArrays.fill``.
        """
        tokens: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        self._arrays.fill(sequences, masks, ahead)
        for start in range(0, len(sequences), LOGIT_ROWS):
            block = sequences[start : start + LOGIT_ROWS]
            chosen: list[int] = self._network.sample(*self._arrays.block(start, start + len(block))).tolist()
            self._arrays.take_surprise(start, start + len(block))
            tokens += chosen
            logprobs += self._report(block, chosen)
        return tokens, logprobs

    def score(self, sequences: list[Sequence]) -> list[list[TokenLogprobs]]:
        """For each sequence what ``prompt_logprobs`` asks for, of the prompt tokens that this step's unscored positions foretell.

        No more than LOGIT_ROWS rows of logits exist at a time.
        """
        wanted = [(seq, position) for seq in sequences for position in seq.unscored]
        found: dict[Sequence, list[TokenLogprobs]] = {seq: [] for seq in sequences}
        for start in range(0, len(wanted), LOGIT_ROWS):
            block = wanted[start : start + LOGIT_ROWS]
            rows = [seq.row_of(position) for seq, position in block]
            logits = self._network.logits(np.array(rows, np.int32))
            for row, (seq, position) in zip(logits, block, strict=True):
                count = seq.request.params.prompt_logprobs or 0
                found[seq].append(token_logprobs(row, seq.token_ids[position + 1], count))
        return list(found.values())

    def _report(self, sequences: list[Sequence], tokens: list[int]) -> list[TokenLogprobs | None]:
        """The log-probabilities of a block's tokens, where wanted; each from its own row alone."""
        wanted = [seq.request.params for seq in sequences]
        if not any(params.reports_logprobs for params in wanted):
            return [None] * len(sequences)
        logits = self._network.last_logits
        return [
            token_logprobs(logits[row], token, params.logprobs or 0, params.logprob_token_ids or ())
            if params.reports_logprobs and token >= 0
            else None
            for row, (token, params) in enumerate(zip(tokens, wanted, strict=True))
        ]


def token_logprobs(logits: NDArray[np.float32], token: int, count: int, asked: Row[int] = ()) -> TokenLogprobs:
    """log_softmax of raw logits [vocab] at ``token``, at the ``count`` best ids (ties to the lowest) and at those ``asked`` for, in
    float64."""
    scores = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # +inf makes NaN of every value: no reason to fail the whole step
        scores -= scores.max()
        scores -= np.log(np.exp(scores).sum())
    top = tuple((int(best), float(scores[best])) for best in _best_ids(logits, count))
    others = tuple((other, float(scores[other]), _rank(logits, other)) for other in asked)
    return TokenLogprobs(token, float(scores[token]), _rank(logits, token), top, others)


def _rank(logits: NDArray[np.float32], token: int) -> int:
    return int(np.count_nonzero(logits >= logits[token]))


def _best_ids(logits: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Ids of the ``count`` highest logits, best first, ties to the lowest id."""
    count = min(count, len(logits))
    if count == 0:
        return np.empty(0, np.intp)
    least = np.partition(logits, len(logits) - count)[len(logits) - count]
    ids = np.flatnonzero(logits >= least)
    return ids[np.argsort(-logits[ids], kind="stable")][:count]
