"""A model in people's own Ray Data pipelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec
import numpy as np

from shoal.errors import ParameterError
from shoal.jobs.running.engine_half import derived_seed
from shoal.llm import LLM
from shoal.params import SamplingParams
from shoal.requests.outputs import RequestOutput
from shoal.requests.prompts import Prompt

# Columns that say how a row is answered, where they are there and a cell is not empty.
SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
)


class _Answer(NamedTuple):
    """A column each."""

    generated_text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    error: str


class BatchPredictor:
    """Answers the rows of batches; for ``Dataset.map_batches``, which makes one for each actor:

        answered = dataset.map_batches(
            BatchPredictor, fn_constructor_kwargs={"model": "smollm2:135m", "threads": 4}, concurrency=2, num_cpus=4, batch_size=256
        )

    ``sampling_params``: a SamplingParams or its fields, for rows that do not say themselves (default: for chats what the model's file
    recommends). ``id_column`` names a column whose values are the rows' own: a row without a seed gets one from its id, or, if there is
    no such column, from its prompt. So its text depends neither on where it is computed nor on what with. The other keywords are those
    of LLM; ``threads`` are 1 if not given. Raises ParameterError, and what LLM raises.
    """

    def __init__(
        self,
        model: str,
        *,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        id_column: str | None = None,
        threads: int = 1,
        **engine: Any,
    ) -> None:
        if isinstance(sampling_params, Mapping):
            sampling_params = SamplingParams(**sampling_params)
        if sampling_params is not None and sampling_params.n != 1:
            raise ParameterError("n", sampling_params.n, "1: each row has one answer")
        self._llm = LLM(model, threads=threads, **engine)
        self._params, self._id_column = sampling_params, id_column

    def __call__(self, batch: Any) -> Any:
        """The batch (a dict of arrays, or a pandas DataFrame) with the columns ``generated_text``, ``finish_reason``,
        ``prompt_tokens``, ``completion_tokens`` and ``error``. It must have a column ``prompt`` or ``messages``.

        A row that cannot be answered has an ``error``, which is else empty, and finish_reason "error". Raises ParameterError for
        batches without the columns that are needed.
        """
        columns = {name: list(batch[name]) for name in self._columns(batch)}
        rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
        answers = self._answers(rows)
        added = {
            name: np.array([answer[i] for answer in answers], dtype=np.int64 if name.endswith("tokens") else object)
            for i, name in enumerate(_Answer._fields)
        }
        return batch.assign(**added) if hasattr(batch, "assign") else {**batch, **added}

    def _columns(self, batch: Any) -> list[str]:
        prompts = [name for name in ("prompt", "messages") if name in batch]
        if len(prompts) != 1:
            raise ParameterError("batch", list(batch), "with a column prompt or messages, and not both")
        if self._id_column is not None and self._id_column not in batch:
            raise ParameterError("id_column", self._id_column, f"one of the columns {list(batch)}")
        ids = [] if self._id_column is None else [self._id_column]
        return list(dict.fromkeys([*prompts, *ids, *(name for name in SAMPLING if name in batch)]))

    def _answers(self, rows: Sequence[Mapping[str, Any]]) -> list[_Answer]:
        refused: dict[int, str] = {}
        asked: dict[int, tuple[Prompt, SamplingParams]] = {}
        for number, row in enumerate(rows):
            try:
                asked[number] = self._prompt(row), self._params_of(row)
            except ParameterError as error:
                refused[number] = str(error)
        answers = {number: _Answer("", "error", 0, 0, why) for number, why in refused.items()}
        if asked:
            prompts, params = zip(*asked.values(), strict=True)
            outputs = self._llm.generate(list(prompts), list(params), use_tqdm=False)
            answers |= {number: _answer(output) for number, output in zip(asked, outputs, strict=True)}
        return [answers[number] for number in range(len(rows))]

    def _prompt(self, row: Mapping[str, Any]) -> Prompt:
        if "prompt" in row:
            if not isinstance(row["prompt"], str):
                raise ParameterError("prompt", row["prompt"], "a text")
            return str(row["prompt"])
        messages = row["messages"]
        if not isinstance(messages, (list, tuple, np.ndarray)) or not all(isinstance(one, Mapping) for one in messages):
            raise ParameterError("messages", messages, "a list of messages")
        return {"messages": [_without_nulls(message) for message in messages]}

    def _params_of(self, row: Mapping[str, Any]) -> SamplingParams:
        base = self._params
        if base is None:
            base = SamplingParams(**(self._llm.chat_defaults if "messages" in row else {}))
        params = replace(
            base, **{name: _plain(row[name]) for name in SAMPLING if name in row and not _is_null(row[name])}
        )
        if params.seed is not None:
            return params
        own = row.get("prompt", row.get("messages")) if self._id_column is None else row[self._id_column]
        return replace(params, seed=derived_seed(self._llm.config.seed, _spelled(own)))


def _answer(output: RequestOutput) -> _Answer:
    (told,) = output.outputs
    reason, error = told.finish_reason or "error", output.error or ""
    return _Answer(told.text, reason, len(output.prompt_token_ids), len(told.token_ids), error)


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of a table all have the fields that any of them has."""
    return {name: value for name, value in message.items() if value is not None}


def _is_null(cell: Any) -> bool:
    return cell is None or (isinstance(cell, (float, np.floating)) and bool(np.isnan(cell)))


def _plain(cell: Any) -> Any:
    """A column of whole numbers with gaps is one of floats."""
    value = cell.item() if isinstance(cell, np.generic) else cell
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _spelled(own: Any) -> str:
    """The same in each format of a batch."""
    if isinstance(own, np.ndarray):
        own = own.tolist()
    if isinstance(own, list):
        return msgspec.json.encode([_without_nulls(message) for message in own], order="deterministic").decode()
    return str(own)
