"""What is run: prompts of random token ids or from a file, and requests of a fixed length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from shoal.errors import ParameterError, RequestError
from shoal.llm import LLM
from shoal.params import SamplingParams
from shoal.requests.outputs import RequestOutput

Prompt = str | dict[str, list[int]]  # as LLM takes them


def random_ids(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """``count`` prompts of ``length`` token ids, drawn evenly from the vocabulary; the same for the same arguments."""
    drawn: list[list[int]] = np.random.default_rng(seed).integers(0, vocab_size, (count, length)).tolist()
    return drawn


def random_prompts(llm: LLM, count: int, length: int) -> list[Prompt]:
    """``random_ids`` in the model's vocabulary, seeded as the engine is, ready for ``LLM.generate``."""
    ids = random_ids(count, length, llm.vocab_size, abs(llm.config.seed))
    return [{"prompt_token_ids": prompt} for prompt in ids]


def read_prompts(path: Path, count: int) -> list[Prompt]:
    """The first ``count`` prompts of a JSONL file with a text ``prompt`` on each line (vLLM's "custom" dataset).

    Raises ParameterError that names the line at fault, or a file without prompts.
    """
    with path.open(encoding="utf-8") as lines:
        prompts: list[Prompt] = [_prompt(path, number, line) for number, line in enumerate(islice(lines, count), 1)]
    if not prompts:
        raise ParameterError("dataset_path", str(path), "a file with at least one prompt")
    return prompts


def _prompt(path: Path, number: int, line: str) -> str:
    try:
        prompt: Any = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise ParameterError("dataset_path", f"{path}:{number}", 'JSON with a text "prompt" on each line')
    return prompt


def fixed_length(tokens: int) -> SamplingParams:
    """Exactly ``tokens`` tokens, sampled at temperature 1 as vLLM's benchmarks do."""
    return SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=tokens)


def answers(
    llm: LLM, prompts: Sequence[Prompt], params: SamplingParams, *, progress: bool = False
) -> list[RequestOutput]:
    """All prompts answered together. Raises RequestError if one of them failed: its time would be no measurement."""
    outputs = llm.generate(prompts, params, use_tqdm=progress)
    for output in outputs:
        if output.error is not None:
            raise RequestError(f"request {output.request_id} of the benchmark failed: {output.error}")
    return outputs
