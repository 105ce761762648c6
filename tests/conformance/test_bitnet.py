"""BitNet b1.58 as Microsoft's files have it: squared ReLU gates and ternary weights. llama.cpp has no such graph to compare with, so
the CPU backend is held to float arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shoal.llm import LLM
from tests.conformance.test_archs import nmse
from tests.support.gguf_builder import GGUFBuilder

WIDTH, HEADS, FF, VOCAB = 256, 4, 512, 96


def write_bitnet(path: Path, architecture: str, fmt: str) -> Path:
    """Two layers of ternary matrices, F32 elsewhere."""
    builder, rng = GGUFBuilder(), np.random.default_rng(5)
    builder.add("general.architecture", architecture)
    numbers = {
        "embedding_length": WIDTH,
        "block_count": 2,
        "feed_forward_length": FF,
        "attention.head_count": HEADS,
        "attention.head_count_kv": 2,
        "context_length": 256,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    for key, value in numbers.items():
        builder.add(f"{architecture}.{key}", value)
    shapes = {
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (WIDTH // 2, WIDTH),
        "attn_v": (WIDTH // 2, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_gate": (FF, WIDTH),
        "ffn_up": (FF, WIDTH),
        "ffn_down": (WIDTH, FF),
    }
    norms = {"attn_norm": WIDTH, "attn_sub_norm": WIDTH, "ffn_norm": WIDTH, "ffn_sub_norm": FF}
    builder.add_random_tensor("token_embd.weight", (VOCAB, WIDTH), "F32", rng, std=1.0)
    builder.add_tensor("output_norm.weight", np.ones(WIDTH))
    for i in range(2):
        for name, shape in shapes.items():
            builder.add_random_tensor(f"blk.{i}.{name}.weight", shape, fmt, rng, std=0.1)
        for name, width in norms.items():
            builder.add_tensor(f"blk.{i}.{name}.weight", rng.uniform(0.5, 1.5, width))
    return builder.write(path)


@pytest.mark.parametrize("fmt", ["I2_S", "TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("architecture", ["bitnet-b1.58", "bitnet-25"])
def test_ternary_files(tmp_path: Path, architecture: str, fmt: str) -> None:
    path = write_bitnet(tmp_path / "model.gguf", architecture, fmt)
    tokens = np.random.default_rng(1).integers(0, VOCAB, 40).tolist()
    found = {}
    for device in ("cpu", "reference"):
        with LLM(path, device=device, kv_cache_dtype="f32", skip_tokenizer_init=True) as llm:
            found[device] = llm.logits(tokens)
    assert found["reference"].std() > 0.1
    assert nmse(found["cpu"], found["reference"]) < 2e-3


def test_the_gate_is_a_squared_relu(tmp_path: Path) -> None:
    """The same tensors under the golden architecture's name, with its SiLU, give something else."""
    tokens, found = list(range(20)), []
    for architecture in ("bitnet-b1.58", "bitnet"):
        path = write_bitnet(tmp_path / f"{architecture}.gguf", architecture, "I2_S")
        with LLM(path, device="reference", skip_tokenizer_init=True) as llm:
            found.append(llm.logits(tokens))
    assert nmse(found[0], found[1]) > 0.05
