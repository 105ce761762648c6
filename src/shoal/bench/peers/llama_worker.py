"""llama.cpp's side of ``shoal bench peers``: its batch API, through llama-cpp-python.

    python llama_worker.py '{"model": ..., "threads": 2}'

A script that stands alone: it runs in the interpreter that has llama-cpp-python, which need not have shoal. It says one line of
JSON when the model is loaded; each line of JSON on stdin is a turn (the arguments of ``measure``), answered by one line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import llama_cpp
import numpy as np

BATCH = 512  # n_batch and n_ubatch: most tokens in one call
_PADDING = 256  # llama.cpp rounds the context of a sequence up to this


class Token(NamedTuple):
    """One row of a batch: is it the last of its prompt, so that its logits are wanted?"""

    id: int
    position: int
    sequence: int
    last: bool


class Llama:
    """A loaded model."""

    def __init__(self, model: str, threads: int) -> None:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        self._threads = threads
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def measure(self, prompts: list[list[int]], steps: int, flash_attn: bool, kv_unified: bool) -> dict[str, float]:
        """Seconds to prefill all prompts and choose their first token, and seconds of ``steps`` greedy steps after that."""
        rows = _rows(prompts)
        with self._context(prompts, steps, flash_attn, kv_unified) as context:
            self._decode(context, rows[:BATCH])  # warm up: the first pass touches new memory
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            start = time.perf_counter()
            tokens: list[int] = []
            for first in range(0, len(rows), BATCH):
                tokens += self._decode(context, rows[first : first + BATCH])
            prefilled = time.perf_counter()
            for step in range(steps):
                position = len(prompts[0]) + step
                tokens = self._decode(context, [Token(token, position, s, True) for s, token in enumerate(tokens)])
            end = time.perf_counter()
        return {"prefill_seconds": prefilled - start, "decode_seconds": end - prefilled}

    @contextmanager
    def _context(self, prompts: list[list[int]], steps: int, flash_attn: bool, kv_unified: bool) -> Iterator[Any]:
        """A context with room for the batch and no more."""
        per_sequence = -(-(len(prompts[0]) + steps) // _PADDING) * _PADDING
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = per_sequence * len(prompts), len(prompts)
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F16
        enabled, disabled = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = enabled if flash_attn else disabled
        params.kv_unified = kv_unified
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"llama.cpp cannot make a context for {len(prompts)} sequences")
        try:
            yield context
        finally:
            llama_cpp.llama_free(context)

    def _decode(self, context: Any, rows: Sequence[Token]) -> list[int]:
        """Compute rows; the likeliest next token after each whose logits are wanted."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, row in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = row.id, row.position, row.last
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row.sequence
        status = llama_cpp.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama_decode of {len(rows)} rows returned {status}")
        return [self._greedy(context, i) for i, row in enumerate(rows) if row.last]

    def _greedy(self, context: Any, row: int) -> int:
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, row), (self._vocab_size,))
        return int(logits.argmax())


def _rows(prompts: list[list[int]]) -> list[Token]:
    return [
        Token(token, position, sequence, position == len(prompt) - 1)
        for sequence, prompt in enumerate(prompts)
        for position, token in enumerate(prompt)
    ]


def main() -> None:
    """Load the model, then answer turns until stdin ends."""
    settings = json.loads(sys.argv[1])
    llama = Llama(settings["model"], settings["threads"])
    system = llama_cpp.llama_print_system_info().decode()
    print(json.dumps({"version": llama_cpp.__version__, "system": system}), flush=True)
    for line in sys.stdin:
        print(json.dumps(llama.measure(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
