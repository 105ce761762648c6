"""OpenVINO GenAI's side of ``shoal bench peers``: its continuous batching, step by step.

    python openvino_worker.py '{"model": ..., "threads": 2, "sequences": 32, "context": 512}'

A script that stands alone: it runs in the interpreter that has openvino-genai, which need not have shoal. It says one line of
JSON when the model is loaded; each line of JSON on stdin is a turn (the arguments of ``measure``), answered by one line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np
import openvino
import openvino_genai

ROWS_PER_STEP = 512  # most tokens in one step
_BLOCK = 32  # positions in one block of its KV cache
_DEFAULT_KV = "f16"


class OpenVINO:
    """A loaded model: a pipeline for each type of KV cache asked for, with room for ``sequences`` of ``context`` positions."""

    def __init__(self, model: str, threads: int, sequences: int, context: int) -> None:
        self._model, self._threads = model, threads
        self._blocks = sequences * (context // _BLOCK + 2)
        self._pipelines = {_DEFAULT_KV: self._load(_DEFAULT_KV)}
        self._seen: set[tuple[str, int, int]] = set()

    def measure(self, prompts: list[list[int]], steps: int, kv_type: str) -> dict[str, float]:
        """Seconds until every prompt has its first token, and seconds of the ``steps`` greedy steps after that.

        As in shoal, sequences that are prefilled early decode while the others are prefilled. What has not run yet is run
        once before: the first time, kernels are made for each number of rows.
        """
        if kv_type not in self._pipelines:
            self._pipelines[kv_type] = self._load(kv_type)
        shape = (kv_type, len(prompts), len(prompts[0]))
        if shape not in self._seen:
            self._seen.add(shape)
            self._run(self._pipelines[kv_type], prompts, steps)
        return self._run(self._pipelines[kv_type], prompts, steps)

    def _load(self, kv_type: str) -> Any:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = ROWS_PER_STEP
        scheduler.num_kv_blocks = self._blocks
        scheduler.enable_prefix_caching = False  # a prompt that it has seen would cost nothing
        properties = {"INFERENCE_NUM_THREADS": self._threads, "KV_CACHE_PRECISION": kv_type}
        return openvino_genai.ContinuousBatchingPipeline(self._model, scheduler, "CPU", properties)

    def _run(self, pipeline: Any, prompts: list[list[int]], steps: int) -> dict[str, float]:
        tensors = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        config = self._greedy()
        start = time.perf_counter()
        handles = [pipeline.add_request(number, tensor, config) for number, tensor in enumerate(tensors)]
        waiting = handles
        while waiting:
            pipeline.step()
            waiting = [handle for handle in waiting if not handle.can_read()]
        for handle in handles:
            _read(handle)
        prefilled = time.perf_counter()
        tokens = 0
        for _ in range(steps):
            pipeline.step()
            tokens += sum(_read(handle) for handle in handles)
        end = time.perf_counter()
        _drop(pipeline, handles)
        if tokens != steps * len(prompts):
            raise RuntimeError(f"{steps} decode steps of {len(prompts)} sequences gave {tokens} tokens")
        return {"prefill_seconds": prefilled - start, "decode_seconds": end - prefilled}

    def _greedy(self) -> Any:
        config = openvino_genai.GenerationConfig()
        config.do_sample, config.ignore_eos = False, True
        config.max_new_tokens = self._blocks * _BLOCK  # never reached
        return config


def _read(handle: Any) -> int:
    """How many tokens a sequence has got since it was last read."""
    return sum(len(output.generated_ids) for output in handle.read().values()) if handle.can_read() else 0


def _drop(pipeline: Any, handles: list[Any]) -> None:
    for handle in handles:
        handle.cancel()
    while pipeline.has_non_finished_requests():
        pipeline.step()


def main() -> None:
    """Load the model, then answer turns until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the library prints is no answer
    peer = OpenVINO(**json.loads(sys.argv[1]))
    print(json.dumps({"version": openvino_genai.__version__}), file=answers)
    for line in sys.stdin:
        print(json.dumps(peer.measure(**json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
