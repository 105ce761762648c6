"""``shoal bench sampling``: what a step costs when every row is sampled in its own way, beside the same step with greedy rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shoal.bench.markdown import table
from shoal.bench.timing import seconds
from shoal.bench.workload import Prompt, random_prompts
from shoal.llm import LLM
from shoal.params import SamplingParams

_INPUT_LEN = 32


def _greedy(row: int) -> dict[str, Any]:
    return {"temperature": 0.0}


def _mixed(row: int) -> dict[str, Any]:
    """Other penalties, top_p, bias and seed in each row."""
    return {
        "seed": row,
        "temperature": 0.5 + 0.01 * (row % 50),
        "top_p": 0.8 + 0.005 * (row % 40),
        "presence_penalty": 0.02 * (row % 50),
        "frequency_penalty": 0.01 * (row % 50),
        "repetition_penalty": 1.0 + 0.005 * (1 + row % 50),
        "logit_bias": {token: (token + row) % 7 - 3.0 for token in range(100, 110)},
    }


def _chain(row: int) -> dict[str, Any]:
    """Most of llama.cpp's samplers."""
    return {
        "seed": row,
        "dry_multiplier": 0.8,
        "dry_sequence_breakers": [],  # they need a tokenizer
        "top_n_sigma": 2.0,
        "typical_p": 0.9,
        "min_p": 0.02,
        "top_k": 100,
        "top_p": 0.95,
        "xtc_probability": 0.5,
    }


WAYS: Mapping[str, Callable[[int], dict[str, Any]]] = {
    "greedy": _greedy,
    "penalties, top-p, bias, seeds": _mixed,
    "DRY, top-n-sigma, typical, min-p, top-k, top-p, XTC": _chain,
}


@dataclass(frozen=True, slots=True)
class SamplingCost:
    """``step_seconds``: median for each way to sample. ``times_greedy``: median over rounds of the ratio to the greedy steps of the
    same round."""

    sequences: int
    step_seconds: Mapping[str, float]
    times_greedy: Mapping[str, float]

    def as_markdown(self) -> str:
        """A table."""
        rows = [
            (way, f"{1e3 * self.step_seconds[way]:.2f}", f"{self.times_greedy[way]:.3f}") for way in self.step_seconds
        ]
        return table([f"{self.sequences} rows", "ms a step", "times greedy"], rows)

    def as_json(self) -> dict[str, Any]:
        """The same, for programs."""
        return asdict(self)


def measure_sampling_cost(llm: LLM, sequences: int, steps: int, rounds: int) -> SamplingCost:
    """Decode ``sequences`` rows for so many steps in each way, in turns, ``rounds`` times. The first turn of each is not counted."""
    prompts = random_prompts(llm, sequences, _INPUT_LEN)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        for way, fields in WAYS.items():
            params = [SamplingParams(max_tokens=steps + 1, ignore_eos=True, **fields(row)) for row in range(sequences)]
            took = _decode_seconds(llm, prompts, params, steps)
            if number:
                times[way].append(took)
    return SamplingCost(
        sequences,
        {way: statistics.median(found) for way, found in times.items()},
        {
            way: statistics.median(some / greedy for some, greedy in zip(found, times["greedy"], strict=True))
            for way, found in times.items()
        },
    )


def _decode_seconds(llm: LLM, prompts: Sequence[Prompt], params: Sequence[SamplingParams], steps: int) -> float:
    """Seconds of a step, once all prompts are done and until nothing is left to do."""
    waiting = {llm.submit(prompt, each) for prompt, each in zip(prompts, params, strict=True)}
    while waiting:
        waiting -= {output.request_id for output in llm.step() if output.outputs[0].token_ids}
    return seconds(lambda: _finish(llm)) / steps


def _finish(llm: LLM) -> None:
    while llm.has_work:
        llm.step()
