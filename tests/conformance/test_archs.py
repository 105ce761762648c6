"""One tiny model of each architecture against llama.cpp's logits for all positions, computed in four ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.errors import UnsupportedError
from shoal.llm import LLM

SILU = (
    *("llama", "llama_headdim", "llama3_ropefreqs", "llama_rope_linear", "llama_rope_yarn", "llama_bias", "llama_moe"),
    *("qwen2", "qwen2moe", "qwen3", "qwen3moe", "phi3", "phi3_longrope_long", "phi3_longrope_short", "stablelm"),
    *("stablelm_par", "olmo2", "granite", "smollm3", "bitnet", "command_r", "cohere2", "exaone", "internlm2", "glm4"),
    *("deepseek", "deepseek2", "deepseek2_lite"),
)
GELU = (
    *("gemma", "gemma2", "gemma3", "phi2", "gpt2", "gptneox", "gptneox_seq", "falcon7b", "falcon40b", "starcoder2"),
    *("mpt", "bloom"),
)
CONTEXT = 256  # llama.cpp's when the logits were made: it chooses between phi3's long and short rope factors
SHORT_CONTEXT = {"gpt2": 64}


# int8 pages: llama.cpp gives no figure; a rounding of 1/254 of the largest of 32 values, in K and V of two to six layers.
Q8_0_TOLERANCE = 2e-3


def tolerance(name: str, kv: str) -> float:
    if kv == "q8_0":
        return Q8_0_TOLERANCE
    if kv == "f16":
        return 2e-5
    return 1e-9 if name in SILU else 1e-6


def nmse(a: NDArray[Any], r: NDArray[Any]) -> float:
    return float(((a.astype(np.float64) - r) ** 2).mean() / (r.astype(np.float64) ** 2).mean())


def golden_logits(golden: Path, name: str) -> tuple[list[int], NDArray[np.float32]]:
    with np.load(golden / f"archs/{name}.npz") as file:
        return file["tokens"].tolist(), file["logits"]


def load(golden: Path, name: str, device: str, kv: str, rows: int) -> LLM:
    return LLM(
        golden / f"archs/{name}.gguf",
        device=device,
        kv_cache_dtype=kv,
        max_model_len=SHORT_CONTEXT.get(name, CONTEXT),
        max_num_seqs=min(4, rows),
        max_num_batched_tokens=rows,
        skip_tokenizer_init=True,
    )


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("kv", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("name", SILU + GELU)
def test_logits(golden: Path, name: str, kv: str, device: str) -> None:
    """As one batch, beside others, in chunks of 7, one token at a time: near llama.cpp's, and on the CPU the same bits."""
    tokens, expected = golden_logits(golden, name)
    with load(golden, name, device, kv, 128) as llm:
        ways = [llm.logits(tokens), llm.logits([tokens[3:20], tokens, tokens[:1], tokens[7:]])[1]]
    for rows in (7, 1):
        with load(golden, name, device, kv, rows) as llm:
            ways.append(llm.logits(tokens))
    for logits in ways:
        assert nmse(logits, expected) <= tolerance(name, kv)
        assert device != "cpu" or np.array_equal(logits, ways[0])


def test_every_golden_model_is_here(golden: Path) -> None:
    assert {path.stem for path in golden.glob("archs/*.gguf")} == {*SILU, *GELU}


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path: Path, golden: Path) -> None:
    data = (golden / "archs/mpt.gguf").read_bytes().replace(b"mpt", b"mqt")
    (tmp_path / "mqt.gguf").write_bytes(data)
    with pytest.raises(UnsupportedError, match=r"'mqt' is not supported; known: .*llama"):
        LLM(tmp_path / "mqt.gguf", skip_tokenizer_init=True)
