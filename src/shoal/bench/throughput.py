"""Throughput: many requests at once, as ``vllm bench throughput`` measures it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shoal.bench.workload import Prompt, answers
from shoal.llm import LLM
from shoal.params import SamplingParams


@dataclass(frozen=True, slots=True)
class ThroughputResult:
    """Seconds for all requests, and their tokens. ``sequential_time``: seconds for the same requests one after the other."""

    elapsed_time: float
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    sequential_time: float | None = None

    @property
    def total_num_tokens(self) -> int:
        """Prompt and output tokens."""
        return self.num_prompt_tokens + self.num_output_tokens

    def as_json(self) -> dict[str, Any]:
        """vLLM's keys, and ours where the requests were also run one after the other."""
        found: dict[str, Any] = {
            "elapsed_time": self.elapsed_time,
            "num_requests": self.num_requests,
            "total_num_tokens": self.total_num_tokens,
            "requests_per_second": self.num_requests / self.elapsed_time,
            "tokens_per_second": self.total_num_tokens / self.elapsed_time,
        }
        if self.sequential_time is not None:
            found["sequential_time"] = self.sequential_time
            found["speedup"] = self.sequential_time / self.elapsed_time
        return found

    def __str__(self) -> str:
        rates = [
            count / self.elapsed_time for count in (self.num_requests, self.total_num_tokens, self.num_output_tokens)
        ]
        lines = [
            "Throughput: {:.2f} requests/s, {:.2f} total tokens/s, {:.2f} output tokens/s".format(*rates),
            f"Total num prompt tokens:  {self.num_prompt_tokens}",
            f"Total num output tokens:  {self.num_output_tokens}",
        ]
        if self.sequential_time is not None:
            speedup = self.sequential_time / self.elapsed_time
            lines.append(
                f"One at a time: {self.sequential_time:.2f} s, together {self.elapsed_time:.2f} s: {speedup:.2f}x"
            )
        return "\n".join(lines)


def measure_throughput(
    llm: LLM, prompts: Sequence[Prompt], params: SamplingParams, *, compare_sequential: bool = False
) -> ThroughputResult:
    """Answer all prompts together, after one alone to warm up; with ``compare_sequential`` also one after the other."""
    answers(llm, prompts[:1], params)
    start = time.perf_counter()
    outputs = answers(llm, prompts, params, progress=True)
    elapsed = time.perf_counter() - start
    return ThroughputResult(
        elapsed_time=elapsed,
        num_requests=len(prompts),
        num_prompt_tokens=sum(len(output.prompt_token_ids) for output in outputs),
        num_output_tokens=sum(len(output.outputs[0].token_ids) for output in outputs),
        sequential_time=_one_at_a_time(llm, prompts, params) if compare_sequential else None,
    )


def _one_at_a_time(llm: LLM, prompts: Sequence[Prompt], params: SamplingParams) -> float:
    start = time.perf_counter()
    for prompt in prompts:
        answers(llm, [prompt], params)
    return time.perf_counter() - start
