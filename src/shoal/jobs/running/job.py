"""A job: rows go into the engine as it has room, and each comes out as one record in the ledger."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from shoal.errors import EngineError, ParameterError, RequestError, TemplateError
from shoal.jobs.durable.ledger import Ledger, StreamLedger, Totals, Usage
from shoal.jobs.durable.manifest import State
from shoal.jobs.input.rows import AnyRow, BadRow, EmbeddingRow, Row
from shoal.jobs.running.embedding_rows import EmbeddingRows
from shoal.jobs.running.interrupts import Interrupts
from shoal.jobs.running.progress import JobProgress
from shoal.jobs.running.records import FailureCode, Record, failed, refused, succeeded
from shoal.openai.convert import answer, refusal
from shoal.openai.embeddings import embedding_answer, embedding_refusal
from shoal.openai.schema import ChatCompletion, TextCompletion

if TYPE_CHECKING:
    from shoal.engine.engine import EngineStats
    from shoal.jobs.running.engine_half import EngineHalf
    from shoal.requests.outputs import RequestOutput
    from shoal.requests.pooled import EmbeddingRequestOutput

Rows = Iterator[AnyRow]
AnyLedger = Ledger | StreamLedger
Report = Callable[[JobProgress], None]

_SECONDS_BETWEEN_LOOKS = 1.0  # at the clock, and at whether the job is cancelled

# What becomes of rows that were not finished when the job was brought to its end.
CLOSING: dict[str, tuple[FailureCode, str]] = {
    "expired": ("batch_expired", "the job's deadline has passed"),
    "cancelled": ("batch_cancelled", "the job was cancelled"),
}


@dataclass(frozen=True, slots=True)
class JobLimits:
    """When to give up.

    ``timeout``: seconds for one row. ``deadline``: the moment (Unix time) at which all that is not finished expires. ``max_errors``:
    the job stops when more rows than this have failed. ``cancelled`` is asked about once a second, ``interrupted`` before each step:
    it is a signal's twin for jobs that no signal reaches.
    """

    timeout: float | None = None
    deadline: float | None = None
    max_errors: int | None = None
    cancelled: Callable[[], bool] = lambda: False
    interrupted: Callable[[], bool] = lambda: False

    def reached(self) -> Literal["cancelled", "expired"] | None:
        """Whether the job has to be brought to its end now, and as what."""
        if self.cancelled():
            return "cancelled"
        return "expired" if self.deadline is not None and time.time() >= self.deadline else None


class Job:
    """Works through rows on ``engine``. ``served`` are the names of its model, the first one the name in answers.

    At most 1.5 times ``max_num_seqs`` rows are held at once: the engine stays full, and memory does not grow with the
    input. A row without a seed gets one from the engine's seed and its custom_id, so that its answer does not depend on
    where it stands.
    """

    def __init__(
        self, engine: EngineHalf, served: Sequence[str], ledger: AnyLedger, limits: JobLimits | None = None
    ) -> None:
        self._engine = engine
        self._served = served
        self._ledger = ledger
        self._limits = limits or JobLimits()
        self._window = engine.config.max_num_seqs + engine.config.max_num_seqs // 2
        self._running: dict[str, Row | EmbeddingRow] = {}
        self._embeddings = EmbeddingRows(engine, self._limits.timeout)
        self._interrupts = Interrupts()
        self._failed = ledger.totals.failed
        self._pace = _Pace(time.monotonic(), ledger.totals.generated_tokens, ledger.totals.done + self._failed)
        self._next_look = 0.0
        self._drafts = (0, 0)  # drafted and accepted tokens of the engine before the job

    def run(self, rows: Rows, total: int | None, report: Report) -> State:
        """Bring a record for each of ``rows`` into the ledger; ``report`` hears how far it is. ``total``: rows of the whole input.

        Returns "finished"; "interrupted" after a signal or "stopped" after too many failures, where the rest can be taken up
        again; "expired" or "cancelled", where the rest has been recorded as that. Raises EngineError where the engine itself is
        broken. What was finished is durable then, but for a second signal, which does not wait for that.
        """
        try:
            with self._interrupts.watched():
                state = self._work(rows, total, report)
        except KeyboardInterrupt:
            return "interrupted"
        except EngineError:
            self._ledger.commit()
            raise
        finally:
            self._abort_running()
        self._ledger.commit()
        return state

    def _work(self, rows: Rows, total: int | None, report: Report) -> State:
        more, now = True, time.monotonic()
        self._drafts = _drafts(self._engine.stats())
        while more or self._running:
            state = self._reason_to_end()
            if state in CLOSING:
                self._close(rows, state)
            if state is not None:
                return state
            if more and len(self._running) < self._window:
                more = self._take_next(rows)
            else:
                self._step()
            before, now = now, time.monotonic()
            self._ledger.totals.seconds += now - before
            self._ledger.commit_if_due()
            report(self._pace.progress(self._ledger.totals, total))
        return "finished"

    def _reason_to_end(self) -> State | None:
        if self._interrupts.requested or self._limits.interrupted():
            return "interrupted"
        if self._limits.max_errors is not None and self._failed > self._limits.max_errors:
            return "stopped"
        now = time.monotonic()
        if now < self._next_look:
            return None
        self._next_look = now + _SECONDS_BETWEEN_LOOKS
        return self._limits.reached()

    def _take_next(self, rows: Rows) -> bool:
        """Take one row in; False at the end of the input."""
        try:
            with self._interrupts.at_once():
                row = next(rows, None)
        except KeyboardInterrupt:  # while it waited for input
            self._interrupts.requested = True
            return True
        if isinstance(row, BadRow):
            self._refuse(row)
        elif isinstance(row, EmbeddingRow):
            self._submit_embedding(row)
        elif row is not None:
            self._submit(row)
        return row is not None

    def _submit(self, row: Row) -> None:
        params, request_id = row.call.params, str(row.line)
        if params.seed is None:
            params = replace(params, seed=derived_seed(self._engine.config.seed, row.custom_id))
        try:
            self._engine.submit(
                row.call.prompt,
                row.call.beams or params,
                request_id=request_id,
                priority=row.call.priority,
                timeout=self._limits.timeout,
            )
        except (RequestError, ParameterError, TemplateError) as error:
            self._refuse(BadRow(row.line, row.custom_id, refusal(row.call, error)))
        else:
            self._running[request_id] = row

    def _submit_embedding(self, row: EmbeddingRow) -> None:
        try:
            self._embeddings.submit(row.line, row.call)
        except (RequestError, ParameterError) as error:
            self._refuse(BadRow(row.line, row.custom_id, embedding_refusal(error)))
        else:
            self._running[str(row.line)] = row

    def _refuse(self, row: BadRow) -> None:
        self._failed += 1
        refuse(row, self._ledger)

    def _step(self) -> None:
        finished = [output for output in self._engine.step() if output.finished]
        embedded = self._embeddings.finished()
        self._count_step(len(finished) + sum(len(outputs) for _, outputs in embedded))
        for output in finished:
            row = self._running.pop(output.request_id)
            assert isinstance(row, Row), "embeddings come another way"
            self._finish(row, output)
        for line, outputs in embedded:
            asked = self._running.pop(str(line))
            assert isinstance(asked, EmbeddingRow), "only these are under way there"
            self._finish_embedding(asked, outputs)

    def _count_step(self, finished: int) -> None:
        """A full step ran as many sequences as it may, or as there were tokens and memory for."""
        stats, totals = self._engine.stats(), self._ledger.totals
        if stats.broken is not None:
            raise EngineError(f"the engine failed: {stats.broken}")
        ran = stats.running + finished
        totals.steps += 1
        totals.row_steps += ran
        totals.draft_tokens, totals.accepted_tokens = (
            count - before for count, before in zip(_drafts(stats), self._drafts, strict=True)
        )
        totals.full_steps += ran >= self._engine.config.max_num_seqs or stats.waiting > 0

    def _finish(self, row: Row, output: RequestOutput) -> None:
        answered = all(given.finish_reason in ("stop", "length") for given in output.outputs)
        if not answered:
            self._failed += 1
        record = succeeded(row.custom_id, self._answer(row, output)) if answered else self._failure(row, output)
        self._ledger.add(row.line, record.line(), failed=not answered, usage=_usage(output))

    def _finish_embedding(self, row: EmbeddingRow, outputs: list[EmbeddingRequestOutput]) -> None:
        bad = next((output for output in outputs if output.finish_reason != "stop"), None)
        if bad is None:
            model = row.call.model or self._served[0]
            record = succeeded(
                row.custom_id, embedding_answer(row.call, outputs, response_id=uuid.uuid4().hex, model=model)
            )
        else:
            self._failed += 1
            record = self._failed_record(row, bad.finish_reason, bad.error)
        tokens, cached = sum(len(o.prompt_token_ids) for o in outputs), sum(o.num_cached_tokens for o in outputs)
        self._ledger.add(row.line, record.line(), failed=bad is not None, usage=Usage(tokens, cached, 0))

    def _failure(self, row: Row, output: RequestOutput) -> Record:
        late = any(given.finish_reason == "timeout" for given in output.outputs)
        return self._failed_record(row, "timeout" if late else None, output.error)

    def _failed_record(self, row: Row | EmbeddingRow, finish_reason: str | None, error: str | None) -> Record:
        if finish_reason == "timeout":
            late = f"the row was not finished within {self._limits.timeout:g} s"
            return failed(row.custom_id, "request_timeout", late)
        return failed(row.custom_id, "server_error", error or "the request was aborted")

    def _answer(self, row: Row, output: RequestOutput) -> ChatCompletion | TextCompletion:
        tokenizer = self._engine.tokenizer
        assert tokenizer is not None, "a job's model is loaded with its tokenizer"
        model = row.call.model or self._served[0]
        return answer(row.call, output, response_id=uuid.uuid4().hex, model=model, tokenizer=tokenizer)

    def _close(self, rows: Rows, state: str) -> None:
        """Record all that is not finished as expired or cancelled."""
        running = list(self._running.values())
        self._abort_running()
        close(iter(running), self._ledger, state)
        close(rows, self._ledger, state)

    def _abort_running(self) -> None:
        for request_id in self._running:
            self._engine.abort(request_id)
        self._embeddings.abort()
        self._running.clear()


@dataclass(frozen=True, slots=True)
class _Pace:
    """Where a run began: on the clock, and in tokens and rows."""

    started: float
    tokens: int
    rows: int

    def progress(self, totals: Totals, total: int | None) -> JobProgress:
        seconds = time.monotonic() - self.started
        finished = totals.done + totals.failed - self.rows
        return JobProgress(totals, total, seconds, totals.generated_tokens - self.tokens, finished)


def close(rows: Rows, ledger: AnyLedger, state: str) -> None:
    """Record all of ``rows`` as ``state`` ("expired" or "cancelled"); those that are wrong in themselves as that."""
    code, message = CLOSING[state]
    for row in rows:
        if isinstance(row, BadRow):
            refuse(row, ledger)
        else:
            ledger.add(row.line, failed(row.custom_id, code, message).line(), failed=True)
        ledger.commit_if_due()


def refuse(row: BadRow, ledger: AnyLedger) -> None:
    """Record a row that is wrong in itself."""
    ledger.add(row.line, refused(row.custom_id, row.error, row.line).line(), failed=True)


def derived_seed(seed: int, custom_id: str) -> int:
    """A seed of 64 bits for a row: depends on both, looks unrelated to either."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{custom_id}".encode(), digest_size=8).digest(), "little")


def _drafts(stats: EngineStats) -> tuple[int, int]:
    return stats.spec_decode_num_draft_tokens, stats.spec_decode_num_accepted_tokens


def _usage(output: RequestOutput) -> Usage:
    answered = sum(len(completion.token_ids) for completion in output.outputs)
    return Usage(len(output.prompt_token_ids), output.num_cached_tokens, answered)
