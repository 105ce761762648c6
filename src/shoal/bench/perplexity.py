"""Perplexity: how well a model predicts a text, by the method of llama.cpp's llama-perplexity.

The text is cut into chunks of ``ctx_size`` tokens (a shorter rest is not used), each run from an empty KV cache, with BOS in place of
its first token if the model starts texts with one. The tokens of the second half of a chunk are scored.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shoal.errors import RequestError
from shoal.llm import LLM
from shoal.params import SamplingParams
from shoal.text.tokenizer import Tokenizer

_SCORE = SamplingParams(prompt_logprobs=0, max_tokens=0)


@dataclass(frozen=True, slots=True)
class Score:
    """-ln p of every scored token, [chunks, scored tokens of a chunk], and how it came about."""

    nll: NDArray[np.float64]
    ctx_size: int
    num_tokens: int

    @property
    def ppl(self) -> float:
        """exp of the mean -ln p."""
        return math.exp(self.nll.mean())

    @property
    def stderr(self) -> float:
        """Standard error of ``ppl``: how well so many tokens stand for all text of the kind; 0 for a single token."""
        variance = float((self.nll**2).mean() - self.nll.mean() ** 2)
        return self.ppl * math.sqrt(max(0.0, variance) / max(1, self.nll.size - 1))


def score_text(llm: LLM, text: str, ctx_size: int = 512) -> Score:
    """Score a text, with progress on stderr. Raises RequestError if it has fewer than ``ctx_size`` tokens."""
    assert llm.tokenizer is not None, "loaded without skip_tokenizer_init"
    ids = llm.tokenizer.encode(text)
    count = len(ids) // ctx_size
    if count == 0:
        raise RequestError(f"the text has {len(ids)} tokens; one chunk of --ctx-size needs {ctx_size}", "file")
    chunks = [_chunk(llm.tokenizer, ids[i * ctx_size : (i + 1) * ctx_size]) for i in range(count)]
    rows: list[NDArray[np.float64]] = []
    with _progress(len(chunks)) as progress:
        for chunk in chunks:
            rows.append(token_nll(llm, chunk)[ctx_size // 2 :])
            progress.done(np.array(rows))
    return Score(np.array(rows), ctx_size, len(ids))


def token_nll(llm: LLM, ids: list[int]) -> NDArray[np.float64]:
    """-ln p of each of ``ids`` but the first, given those before it. Raises RequestError where they cannot be scored."""
    output = llm.generate({"prompt_token_ids": ids}, _SCORE, use_tqdm=False)[0]
    if output.error is not None:
        raise RequestError(output.error)
    assert output.prompt_logprobs is not None
    places = zip(ids, output.prompt_logprobs, strict=True)
    return np.array([-place[token].logprob for token, place in places if place is not None])


def _chunk(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """A chunk as it is run: BOS takes the place of its first token if the model starts texts with BOS."""
    starts_with_bos = tokenizer.bos_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_id]
    return [tokenizer.encode("")[0], *ids[1:]] if starts_with_bos else ids


class _ChunkProgress:
    """Chunks done and the perplexity so far: a bar on a terminal, a line a chunk elsewhere."""

    def __init__(self, total: int, bar: Progress) -> None:
        self._total, self._bar = total, bar
        self._task = bar.add_task("", total=total, ppl=math.nan)

    def done(self, nll: NDArray[np.float64]) -> None:
        """One more chunk is in ``nll`` [chunks, tokens]."""
        ppl = math.exp(nll.mean())
        self._bar.update(self._task, advance=1, ppl=ppl)
        if self._bar.disable:
            print(f"chunk {len(nll)}/{self._total}: PPL so far {ppl:.4f}", file=sys.stderr)


@contextmanager
def _progress(total: int) -> Iterator[_ChunkProgress]:
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("PPL {task.fields[ppl]:.4f}"), TimeRemainingColumn())
    with Progress("chunks", *columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield _ChunkProgress(total, bar)


def facts(score: Score) -> dict[str, float | list[float]]:
    """A score as JSON."""
    return {
        "ppl": score.ppl,
        "stderr": score.stderr,
        "mean_nll": float(score.nll.mean()),
        "chunk_nll": score.nll.mean(axis=1).tolist(),
        "ctx_size": score.ctx_size,
        "num_tokens": score.num_tokens,
        "num_chunks": len(score.nll),
        "num_scored": score.nll.size,
    }
