"""Throughput: many requests at once, as ``vllm bench throughput`` measures it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shoal.bench.drafts import Drafts
from shoal.bench.workload import Prompt, answers
from shoal.llm import LLM
from shoal.params import SamplingParams


@dataclass(frozen=True, slots=True)
class ThroughputResult:
    """Seconds for all requests, and their tokens.

    ``sequential_time``: seconds for the same requests one after the other; ``busy_time``: together again, while another process
    spins on one core. ``drafts``: of the first of these.
    """

    elapsed_time: float
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    sequential_time: float | None = None
    busy_time: float | None = None
    drafts: Drafts | None = None

    @property
    def total_num_tokens(self) -> int:
        """Prompt and output tokens."""
        return self.num_prompt_tokens + self.num_output_tokens

    def as_json(self) -> dict[str, Any]:
        """vLLM's keys, and ours where the requests were also run in other ways."""
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
        if self.busy_time is not None:
            found["busy_time"] = self.busy_time
            found["busy_share"] = self.elapsed_time / self.busy_time
        return found if self.drafts is None else found | self.drafts.as_json()

    def __str__(self) -> str:
        rates = [
            count / self.elapsed_time for count in (self.num_requests, self.total_num_tokens, self.num_output_tokens)
        ]
        lines = [
            "Throughput: {:.2f} requests/s, {:.2f} total tokens/s, {:.2f} output tokens/s".format(*rates),
            f"Total num prompt tokens:  {self.num_prompt_tokens}",
            f"Total num output tokens:  {self.num_output_tokens}",
        ]
        if self.drafts is not None:
            lines.append(str(self.drafts))
        if self.sequential_time is not None:
            speedup = self.sequential_time / self.elapsed_time
            lines.append(
                f"One at a time: {self.sequential_time:.2f} s, together {self.elapsed_time:.2f} s: {speedup:.2f}x"
            )
        if self.busy_time is not None:
            share = self.elapsed_time / self.busy_time
            lines.append(
                f"With a busy neighbour: {self.busy_time:.2f} s, alone {self.elapsed_time:.2f} s: {share:.0%} of tokens/s"
            )
        return "\n".join(lines)


def measure_throughput(
    llm: LLM,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    compare_sequential: bool = False,
    busy_neighbour: bool = False,
) -> ThroughputResult:
    """Answer all prompts together, after one alone to warm up; if asked to, also one after the other, and together once more
    beside a busy neighbour."""
    answers(llm, prompts[:1], params)
    before, start = llm.engine.stats(), time.perf_counter()
    outputs = answers(llm, prompts, params, progress=True)
    elapsed, drafts = time.perf_counter() - start, Drafts.since(llm, before)
    return ThroughputResult(
        elapsed_time=elapsed,
        num_requests=len(prompts),
        num_prompt_tokens=sum(len(output.prompt_token_ids) for output in outputs),
        num_output_tokens=sum(len(output.outputs[0].token_ids) for output in outputs),
        sequential_time=_one_at_a_time(llm, prompts, params) if compare_sequential else None,
        busy_time=_beside_a_neighbour(llm, prompts, params) if busy_neighbour else None,
        drafts=drafts,
    )


def _one_at_a_time(llm: LLM, prompts: Sequence[Prompt], params: SamplingParams) -> float:
    start = time.perf_counter()
    for prompt in prompts:
        answers(llm, [prompt], params)
    return time.perf_counter() - start


def _beside_a_neighbour(llm: LLM, prompts: Sequence[Prompt], params: SamplingParams) -> float:
    with busy_process():
        start = time.perf_counter()
        answers(llm, prompts, params)
        return time.perf_counter() - start


@contextmanager
def busy_process() -> Iterator[None]:
    """A process that keeps one core busy."""
    process = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    with process:
        assert process.stdout is not None, "opened with a pipe"
        process.stdout.readline()  # from now on it spins
        try:
            yield
        finally:
            process.kill()
