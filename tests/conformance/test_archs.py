"""The tiny models of the llama architecture against llama.cpp's logits for all positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.errors import UnsupportedError
from shoal.llm import LLM

LLAMAS = ("llama", "llama_headdim", "llama3_ropefreqs", "llama_rope_linear", "llama_rope_yarn", "llama_bias")
TOLERANCE = {"f32": 1e-9, "f16": 2e-5}


def nmse(a: NDArray[Any], r: NDArray[Any]) -> float:
    return float(((a.astype(np.float64) - r) ** 2).mean() / (r.astype(np.float64) ** 2).mean())


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("kv", ["f32", "f16"])
@pytest.mark.parametrize("name", LLAMAS)
def test_logits(golden: Path, name: str, kv: str, device: str) -> None:
    with np.load(golden / f"archs/{name}.npz") as file:
        tokens, expected = file["tokens"], file["logits"]
    path = golden / f"archs/{name}.gguf"
    with LLM(path, device=device, kv_cache_dtype=kv, max_num_seqs=4, skip_tokenizer_init=True) as llm:
        whole = llm.logits(tokens)
    with LLM(path, device=device, kv_cache_dtype=kv, max_num_batched_tokens=7, skip_tokenizer_init=True) as llm:
        in_chunks = llm.logits(tokens)
    assert nmse(whole, expected) <= TOLERANCE[kv]
    assert nmse(in_chunks, expected) <= TOLERANCE[kv]


def test_experts_are_refused_by_name(golden: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"llama\.expert_count: mixtures of experts"):
        LLM(golden / "archs/llama_moe.gguf", skip_tokenizer_init=True)


def test_an_unknown_architecture_is_refused_with_the_known_ones(golden: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"'mpt' is not supported; known: .*llama"):
        LLM(golden / "archs/mpt.gguf", skip_tokenizer_init=True)
