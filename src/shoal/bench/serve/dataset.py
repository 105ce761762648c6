"""Requests of random prompts, as vLLM's dataset ``random`` makes them: token ids for completions, words for chats."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shoal.errors import ParameterError

ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}  # of each backend

# Short and common, so that most tokenizers have one token for each with the space before it.
_TEXT = (
    "the and for are but not you all can her was one our out day get has him his how man new now old see two "
    "way who boy did its let put say she too use time year people take good some could them other than then "
    "look only come over think also back after work first well even want because any these give most water "
    "long little very word just where through much before line right mean same tell follow came show around "
    "form three small set end does another large must big such turn here why ask went men read need land home "
    "us move try kind hand picture "
)
_WORDS = _TEXT.split()


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomShape:
    """How long prompts and answers are, in tokens: evenly from ``1 - range_ratio`` to ``1 + range_ratio`` times ``input_len`` and
    ``output_len``, after ``prefix_len`` that all prompts share. Raises ParameterError."""

    input_len: int = 1024
    output_len: int = 128
    range_ratio: float = 0.0
    prefix_len: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.range_ratio < 1:
            raise ParameterError("random_range_ratio", self.range_ratio, "from 0 to below 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """What every body says beside its prompt; ``extra`` goes in as it is, over all else."""

    ignore_eos: bool = False
    temperature: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt, as ids or words of the vocabulary given by number, and how many tokens to answer it with."""

    numbers: list[int]
    output_len: int


def random_samples(count: int, shape: RandomShape, vocabulary: int, seed: int) -> list[Sample]:
    """``count`` prompts of numbers below ``vocabulary``; the same for the same arguments."""
    random = np.random.default_rng(seed)
    prefix: list[int] = random.integers(0, vocabulary, shape.prefix_len).tolist()
    input_lens = _lengths(random, count, shape.input_len, shape.range_ratio)
    output_lens = _lengths(random, count, shape.output_len, shape.range_ratio)
    return [
        Sample(prefix + random.integers(0, vocabulary, input_len).tolist(), output_len)
        for input_len, output_len in zip(input_lens, output_lens, strict=True)
    ]


def _lengths(random: np.random.Generator, count: int, length: int, ratio: float) -> list[int]:
    low, high = max(1, math.floor(length * (1 - ratio))), math.ceil(length * (1 + ratio))
    drawn: list[int] = random.integers(low, high + 1, count).tolist()
    return drawn


def vocabulary_of(backend: str, vocab_size: int) -> int:
    """How many numbers a prompt is drawn from: ids of the model, or words of ours."""
    return len(_WORDS) if backend == "openai-chat" else vocab_size


def body_of(sample: Sample, backend: str, model: str, sampling: Sampling, *, stream: bool = True) -> dict[str, Any]:
    """The JSON body that asks for a completion of ``sample``."""
    body: dict[str, Any] = {"model": model}
    if backend == "openai-chat":
        words = " ".join(_WORDS[number] for number in sample.numbers)
        body |= {"messages": [{"role": "user", "content": words}], "max_completion_tokens": sample.output_len}
    else:
        body |= {"prompt": sample.numbers, "max_tokens": sample.output_len}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if sampling.ignore_eos:
        body["ignore_eos"] = True
    if sampling.temperature is not None:
        body["temperature"] = sampling.temperature
    return body | dict(sampling.extra)
