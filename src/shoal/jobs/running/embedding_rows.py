"""Rows for /v1/embeddings on their way: each of a row's inputs is a request of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.openai.embeddings import EmbeddingCall

if TYPE_CHECKING:
    from shoal.jobs.running.model import Requests
    from shoal.requests.pooled import EmbeddingRequestOutput

    Outputs = list[EmbeddingRequestOutput | None]


class EmbeddingRows:
    """Which inputs of which rows (by line) are done. ``timeout``: the seconds of each."""

    def __init__(self, requests: Requests, timeout: float | None) -> None:
        self._requests, self._timeout = requests, timeout
        self._rows: dict[int, Outputs] = {}

    def submit(self, line: int, call: EmbeddingCall) -> None:
        """Put all inputs of a row in line. Raises as ``LLM.submit_embedding``, and none of them is under way then."""
        self._rows[line] = [None] * len(call.inputs)
        try:
            for index, prompt in enumerate(call.inputs):
                self._requests.submit_embedding(
                    prompt, call.params, request_id=_name(line, index), timeout=self._timeout
                )
        except BaseException:
            self._abort(line)
            raise

    def finished(self) -> list[tuple[int, list[EmbeddingRequestOutput]]]:
        """The rows that are done since the last call, with an output for each input. One that fails ends its row."""
        if not self._rows:
            return []
        ended: dict[int, list[EmbeddingRequestOutput]] = {}
        for output in self._requests.embeddings():
            line, index = map(int, output.request_id.split("-"))
            row = self._rows.get(line)
            if row is None:
                continue
            row[index] = output
            done = [found for found in row if found is not None]
            if output.finish_reason != "stop" or len(done) == len(row):
                self._abort(line)
                ended[line] = done
        return list(ended.items())

    def abort(self) -> None:
        """End all that is under way."""
        for line in list(self._rows):
            self._abort(line)

    def _abort(self, line: int) -> None:
        for index, found in enumerate(self._rows.pop(line)):
            if found is None:
                self._requests.abort(_name(line, index))


def _name(line: int, index: int) -> str:
    return f"{line}-{index}"
