"""The half of a job that computes: lines of the input go in, the lines of their records come out.

It keeps nothing, so it may be anywhere: in the process of the job, or many of it on other machines. What was given to a half that
is lost is given to another one, and gets the same bits there.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

from shoal.errors import EngineError, ParameterError, RequestError, TemplateError
from shoal.jobs.durable.ledger import NO_USAGE, Usage
from shoal.jobs.input.rows import BadRow, EmbeddingRow, Line, Row, RowReader
from shoal.jobs.running.embedding_rows import EmbeddingRows
from shoal.jobs.running.records import failed, refused, succeeded
from shoal.openai.convert import answer, refusal
from shoal.openai.embeddings import embedding_answer, embedding_refusal
from shoal.openai.schema import ChatCompletion, TextCompletion

if TYPE_CHECKING:
    from shoal.engine.engine import EngineStats
    from shoal.jobs.running.model import JobModel
    from shoal.requests.outputs import RequestOutput
    from shoal.requests.pooled import EmbeddingRequestOutput


class Finished(NamedTuple):
    """A row that has come to its end; ``line`` is its record as JSON, without the line end."""

    row: int
    line: bytes
    failed: bool
    usage: Usage


class Steps(NamedTuple):
    """How many steps were ``run``. ``full`` ones had a full batch; ``rows`` is the sum of rows over all; ``drafted`` tokens were
    computed on a guess, and ``accepted`` ones of them were right."""

    run: int = 0
    full: int = 0
    rows: int = 0
    drafted: int = 0
    accepted: int = 0

    @classmethod
    def total(cls, many: Iterable[Steps]) -> Steps:
        """The sum of each figure."""
        return cls(*map(sum, zip(*many, strict=True)))


class EngineHalf(Protocol):
    """What rows are given to."""

    @property
    def has_room(self) -> bool:
        """Whether one more row should be given to it now, so that it does not run dry."""

    def submit(self, line: Line) -> Finished | None:
        """Take a row in. It may come back at once, if it is wrong in itself."""

    def step(self) -> list[Finished]:
        """Move on, and give back what has ended. May wait, but not for ever. Raises EngineError where nothing can be computed any
        more."""

    def steps(self) -> Steps:
        """Those that were run since this was last asked."""

    def note(self) -> str:
        """A word about how it works, for those who watch; may be empty."""

    def abort(self) -> None:
        """Drop all rows that have not ended."""

    def close(self) -> None:
        """The job has no more use of it. Closing twice does nothing."""


class LocalHalf(EngineHalf):
    """Computes rows on ``model`` here. ``served`` are the model's names, the first one the name in answers; ``timeout``: seconds for
    a row.

    At most 1.5 times ``max_num_seqs`` rows are held at once: the engine stays full, and memory does not grow with the input. A row
    without a seed gets one from the engine's seed and its custom_id, so that its answer does not depend on where it stands.
    """

    def __init__(self, model: JobModel, reader: RowReader, served: Sequence[str], timeout: float | None = None) -> None:
        self._model = model
        self._reader = reader
        self._served = served
        self._timeout = timeout
        self._window = window(model.config.max_num_seqs)
        self._running: dict[str, Row | EmbeddingRow] = {}
        self._embeddings = EmbeddingRows(model, timeout)
        self._drafts = _drafts(model.stats())  # other work before is not the job's
        self._steps = Steps()

    @property
    def has_room(self) -> bool:
        """Whether fewer rows are held than may be."""
        return len(self._running) < self._window

    def submit(self, line: Line) -> Finished | None:
        """Take a row in; one that is wrong in itself comes back at once."""
        row = self._reader.read(line)
        bad = row if isinstance(row, BadRow) else self._submit(row)
        return None if bad is None else refusal_of(bad, line.place)

    def _submit(self, row: Row | EmbeddingRow) -> BadRow | None:
        """Put a row in line, or say what is wrong with it."""
        bad = self._submit_embedding(row) if isinstance(row, EmbeddingRow) else self._submit_text(row)
        if bad is None:
            self._running[str(row.line)] = row
        return bad

    def _submit_text(self, row: Row) -> BadRow | None:
        params = row.call.params
        if params.seed is None:
            params = replace(params, seed=derived_seed(self._model.config.seed, row.custom_id))
        try:
            self._model.submit(
                row.call.prompt,
                row.call.beams or params,
                request_id=str(row.line),
                priority=row.call.priority,
                timeout=self._timeout,
            )
        except (RequestError, ParameterError, TemplateError) as error:
            return BadRow(row.line, row.custom_id, refusal(row.call, error))
        return None

    def _submit_embedding(self, row: EmbeddingRow) -> BadRow | None:
        try:
            self._embeddings.submit(row.line, row.call)
        except (RequestError, ParameterError) as error:
            return BadRow(row.line, row.custom_id, embedding_refusal(error))
        return None

    def step(self) -> list[Finished]:
        """Run a step. Raises EngineError where the engine itself is broken."""
        outputs = [output for output in self._model.step() if output.finished]
        embedded = self._embeddings.finished()
        self._count_step(len(outputs) + sum(len(given) for _, given in embedded))
        return [*map(self._finish, outputs), *(self._finish_embedding(line, given) for line, given in embedded)]

    def _count_step(self, finished: int) -> None:
        """A full step ran as many sequences as it may, or as there were tokens and memory for."""
        stats = self._model.stats()
        if stats.broken is not None:
            raise EngineError(f"the engine failed: {stats.broken}")
        ran = stats.running + finished
        full = ran >= self._model.config.max_num_seqs or stats.waiting > 0
        before, self._drafts = self._drafts, _drafts(stats)
        drafted, accepted = (now - then for now, then in zip(self._drafts, before, strict=True))
        self._steps = Steps.total((self._steps, Steps(1, full, ran, drafted, accepted)))

    def _finish(self, output: RequestOutput) -> Finished:
        row = self._running.pop(output.request_id)
        assert isinstance(row, Row), "embeddings come another way"
        answered = all(given.finish_reason in ("stop", "length") for given in output.outputs)
        usage = _usage(output)
        if answered:
            return Finished(row.line, succeeded(row.custom_id, self._answer(row, output)).line(), False, usage)
        late = any(given.finish_reason == "timeout" for given in output.outputs)
        return self._failure(row, "timeout" if late else None, output.error, usage)

    def _finish_embedding(self, line: int, outputs: list[EmbeddingRequestOutput]) -> Finished:
        row = self._running.pop(str(line))
        assert isinstance(row, EmbeddingRow), "only these are under way there"
        usage = Usage(sum(len(o.prompt_token_ids) for o in outputs), sum(o.num_cached_tokens for o in outputs), 0)
        bad = next((output for output in outputs if output.finish_reason != "stop"), None)
        if bad is not None:
            return self._failure(row, bad.finish_reason, bad.error, usage)
        body = embedding_answer(row.call, outputs, response_id=uuid.uuid4().hex, model=self._name(row))
        return Finished(line, succeeded(row.custom_id, body).line(), False, usage)

    def _failure(self, row: Row | EmbeddingRow, finish_reason: str | None, error: str | None, usage: Usage) -> Finished:
        if finish_reason == "timeout":
            assert self._timeout is not None, "only then is a row too late"
            late = f"the row was not finished within {self._timeout:g} s"
            record = failed(row.custom_id, "request_timeout", late)
        else:
            record = failed(row.custom_id, "server_error", error or "the request was aborted")
        return Finished(row.line, record.line(), True, usage)

    def _answer(self, row: Row, output: RequestOutput) -> ChatCompletion | TextCompletion:
        tokenizer = self._model.tokenizer
        assert tokenizer is not None, "a job's model is loaded with its tokenizer"
        return answer(row.call, output, response_id=uuid.uuid4().hex, model=self._name(row), tokenizer=tokenizer)

    def _name(self, row: Row | EmbeddingRow) -> str:
        return row.call.model or self._served[0]

    def steps(self) -> Steps:
        """Those that were run since this was last asked."""
        steps, self._steps = self._steps, Steps()
        return steps

    def note(self) -> str:
        """Nothing: all that is to be said is said of the job."""
        return ""

    def abort(self) -> None:
        """End all rows that are under way."""
        for request_id in self._running:
            self._model.abort(request_id)
        self._embeddings.abort()
        self._running.clear()

    def close(self) -> None:
        """Close the model."""
        self._model.close()


def window(max_num_seqs: int) -> int:
    """How many rows an engine is given that runs so many at once."""
    return max_num_seqs + max_num_seqs // 2


def refusal_of(row: BadRow, place: str = "") -> Finished:
    """The record of a row that is wrong in itself; ``place`` is that of its Line."""
    return Finished(row.line, refused(row.custom_id, row.error, row.line, place).line(), True, NO_USAGE)


def derived_seed(seed: int, custom_id: str) -> int:
    """A seed of 64 bits for a row: depends on both, looks unrelated to either."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{custom_id}".encode(), digest_size=8).digest(), "little")


def _drafts(stats: EngineStats) -> tuple[int, int]:
    return stats.spec_decode_num_draft_tokens, stats.spec_decode_num_accepted_tokens


def _usage(output: RequestOutput) -> Usage:
    answered = sum(len(completion.token_ids) for completion in output.outputs)
    return Usage(len(output.prompt_token_ids), output.num_cached_tokens, answered)
