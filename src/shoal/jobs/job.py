"""A job: rows go from the input into the engine as it has room, and each comes out as one record."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from shoal.errors import ParameterError, RequestError, TemplateError
from shoal.jobs.interrupts import Interrupts
from shoal.jobs.progress import JobCounts
from shoal.jobs.records import RecordWriter, failed, refused, succeeded
from shoal.jobs.rows import BadRow, Row, RowReader
from shoal.jobs.source import Source
from shoal.openai.convert import answer, refusal
from shoal.openai.schema import APIError, ChatCompletion, TextCompletion

if TYPE_CHECKING:
    from shoal.llm import LLM, RequestOutput


class Job:
    """Works through a batch file on ``llm``. ``served`` are the names of its model, the first one the name in answers.

    At most 1.5 times ``max_num_seqs`` rows are held at once: the engine stays full, and memory does not grow with the
    input. A row without a seed gets one from the engine's seed and its custom_id, so that its answer does not depend on
    where it stands.
    """

    def __init__(self, llm: LLM, served: Sequence[str], results: RecordWriter, errors: RecordWriter) -> None:
        self.counts = JobCounts()
        self._llm = llm
        self._served = served
        self._results = results
        self._errors = errors
        self._window = llm.config.max_num_seqs + llm.config.max_num_seqs // 2
        self._running: dict[str, Row] = {}
        self._interrupts = Interrupts()

    def run(self, source: Source, report: Callable[[JobCounts], None]) -> JobCounts:
        """Write one record for each row of ``source``; ``report`` hears the counts as they change.

        Ctrl-C ends the job early with the records of all finished rows
        written, and ``interrupted`` set.
        """
        self.counts = JobCounts(bytes_total=source.size)
        try:
            with self._interrupts.watched():
                self._work(source, report)
        except KeyboardInterrupt:
            self.counts.interrupted = True
        finally:
            for request_id in self._running:
                self._llm.abort(request_id)
            self._running.clear()
        return self.counts

    def _work(self, source: Source, report: Callable[[JobCounts], None]) -> None:
        rows = self._rows(source)
        more = True
        while (more or self._running) and not self._interrupts.requested:
            if more and len(self._running) < self._window:
                more = self._take_next(rows)
            else:
                self._step()
            self.counts.bytes_read = source.bytes_read
            self.counts.seconds = time.monotonic() - self.counts.started
            report(self.counts)
        self.counts.interrupted = self._interrupts.requested

    def _rows(self, source: Source) -> Iterator[Row | BadRow]:
        for row in _rows_once(source, self._served):
            self.counts.rows_read += 1
            yield row

    def _take_next(self, rows: Iterator[Row | BadRow]) -> bool:
        """Take one row in; False at the end of the input."""
        with self._interrupts.at_once():
            row = next(rows, None)
        if isinstance(row, BadRow):
            self._refuse(row)
        elif row is not None:
            self._submit(row)
        return row is not None

    def _submit(self, row: Row) -> None:
        params, request_id = row.call.params, str(row.line)
        if params.seed is None:
            params = replace(params, seed=derived_seed(self._llm.config.seed, row.custom_id))
        try:
            self._llm.submit(row.call.prompt, params, request_id=request_id)
        except (RequestError, ParameterError, TemplateError) as error:
            self._refuse(BadRow(row.line, row.custom_id, refusal(row.call, error)))
        else:
            self._running[request_id] = row

    def _refuse(self, row: BadRow) -> None:
        self.counts.failed += 1
        self._errors.write(refused(row.custom_id, row.error, row.line))

    def _step(self) -> None:
        for output in self._llm.step():
            if output.finished:
                self._finish(self._running.pop(output.request_id), output)

    def _finish(self, row: Row, output: RequestOutput) -> None:
        self.counts.prompt_tokens += len(output.prompt_token_ids)
        self.counts.generated_tokens += len(output.outputs[0].token_ids)
        if output.outputs[0].finish_reason in ("stop", "length"):
            self.counts.done += 1
            self._results.write(succeeded(row.custom_id, self._answer(row, output)))
        else:
            self.counts.failed += 1
            self._errors.write(failed(row.custom_id, output.error or "the request was aborted"))

    def _answer(self, row: Row, output: RequestOutput) -> ChatCompletion | TextCompletion:
        tokenizer = self._llm.tokenizer
        assert tokenizer is not None, "a job's model is loaded with its tokenizer"
        model = row.call.model or self._served[0]
        return answer(row.call, output, response_id=uuid.uuid4().hex, model=model, tokenizer=tokenizer)


def derived_seed(seed: int, custom_id: str) -> int:
    """A seed of 64 bits for a row: depends on both, looks unrelated to either."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{custom_id}".encode(), digest_size=8).digest(), "little")


def check_strictly(source: Source, served: Sequence[str]) -> None:
    """Read the whole input. Raises RequestError that counts the lines that would be refused and quotes the first."""
    bad = [row for row in _rows_once(source, served) if isinstance(row, BadRow)]
    if bad:
        raise RequestError(f"{len(bad)} bad lines, nothing was run; line {bad[0].line}: {bad[0].error}")


def _rows_once(source: Source, served: Sequence[str]) -> Iterator[Row | BadRow]:
    """The rows of an input; each custom_id may occur once. A hash of 64 bits is kept of it (about 100 bytes a row)."""
    reader = RowReader(served)
    seen: set[bytes] = set()
    for line in source:
        row = reader.read(line)
        if row.custom_id is not None:
            digest = hashlib.blake2b(row.custom_id.encode(), digest_size=8).digest()
            if digest in seen:
                error = APIError(f"custom_id: {row.custom_id!r} was used by an earlier line", "custom_id")
                row = BadRow(row.line, row.custom_id, error)
            seen.add(digest)
        yield row
