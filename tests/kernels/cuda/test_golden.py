"""The golden models through the whole engine on the CUDA backend, under Triton's interpreter, against llama.cpp's logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shoal.llm import LLM
from tests.conformance.test_archs import GELU, SILU, golden_logits, load, nmse

# Weights and activations are rounded to float16 before each product: about 1e-7 a product, and two to six layers of seven of them.
TOLERANCE = {"f32": 1e-5, "f16": 2e-5, "q8_0": 2e-3}
DEEP = {"deepseek2_lite": 5e-5}  # 26 layers


@pytest.mark.parametrize("name", SILU + GELU)
def test_logits(golden: Path, name: str) -> None:
    tokens, expected = golden_logits(golden, name)
    with load(golden, name, "cuda", "f16", 128) as llm:
        assert nmse(llm.logits(tokens), expected) <= DEEP.get(name, TOLERANCE["f16"])


@pytest.mark.parametrize("kv", ["f32", "q8_0"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "mpt"])
def test_other_pages(golden: Path, name: str, kv: str) -> None:
    tokens, expected = golden_logits(golden, name)
    with load(golden, name, "cuda", kv, 128) as llm:
        assert nmse(llm.logits(tokens), expected) <= TOLERANCE[kv]


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3moe", "deepseek2"])
def test_however_it_is_cut(golden: Path, name: str) -> None:
    """Beside others, in chunks of 5, one token at a time (with rows that pad): the same bits."""
    tokens, _ = golden_logits(golden, name)
    tokens = tokens[:12]
    with load(golden, name, "cuda", "f16", 128) as llm:
        whole = llm.logits(tokens)
        assert np.array_equal(llm.logits([tokens[3:9], tokens, tokens[:1]])[1], whole)
    for rows in (5, 1):
        with load(golden, name, "cuda", "f16", rows) as llm:
            assert np.array_equal(llm.logits(tokens), whole)


def test_the_start_says_what_it_runs_on(golden: Path) -> None:
    with LLM(golden / "archs/llama.gguf", device="cuda", skip_tokenizer_init=True) as llm:
        assert "interpreter" in llm._backend.describe()


@pytest.mark.parametrize("layers", [1, 2])
def test_a_part_of_a_model(golden: Path, layers: int) -> None:
    """The first layers on the CPU, the head and maybe a layer here: near llama.cpp's, the same bits beside others and in chunks."""
    tokens, expected = golden_logits(golden, "llama")
    with LLM(
        golden / "archs/llama.gguf",
        device="cuda",
        gpu_layers=layers,
        kv_cache_dtype="f16",
        max_num_batched_tokens=32,
        skip_tokenizer_init=True,
    ) as llm:
        whole = llm.logits(tokens)
        assert np.array_equal(llm.logits([tokens[:9], tokens[5:]])[0], whole[:9])
        assert llm.config.gpu_layers == layers
    assert nmse(whole, expected) <= TOLERANCE["f16"]
