"""Other hyper-parameters than those of the golden files: the CPU backend against float arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shoal.llm import LLM
from tests.conformance.test_archs import nmse
from tests.support.tiny_archs import GEMMA, LLAMA, MLP, TinyArch, tokens

QWEN3 = TinyArch("qwen3", f"{LLAMA} attn_q_norm attn_k_norm")
GEMMA3 = TinyArch("gemma3", f"{GEMMA} attn_q_norm attn_k_norm", ends="token_embd output_norm", gelu=True)
OLMO2 = TinyArch(
    "olmo2", f"attn_q attn_k attn_v attn_q_norm attn_k_norm attn_output post_attention_norm {MLP} post_ffw_norm"
)
SHAPES = {
    "many heads for one": replace(QWEN3, heads=9, kv_heads=1, head_dim=6, n_embd=33, n_ff=17),
    "three for one": replace(QWEN3, heads=6, kv_heads=2, head_dim=14, n_embd=50, n_ff=71, layers=5),
    "wide heads": replace(QWEN3, heads=2, kv_heads=2, head_dim=256, n_embd=24, n_ff=40),
    "another base": replace(QWEN3, keys={"rope.freq_base": 5e5, "rope.dimension_count": 4}),
    "one layer, one head": replace(QWEN3, heads=1, kv_heads=1, head_dim=34, n_embd=18, n_ff=5, layers=1),
    "window of three in seven layers": replace(
        GEMMA3, layers=7, heads=3, kv_heads=1, head_dim=18, n_embd=27, n_ff=19, keys={"attention.sliding_window": 3}
    ),
    "every second layer": replace(
        GEMMA3, layers=4, n_embd=64, keys={"attention.sliding_window": 5, "attention.sliding_window_pattern": 2}
    ),
    "norms of all heads": replace(
        OLMO2, heads=5, kv_heads=5, head_dim=8, shapes={"attn_q_norm": (40,), "attn_k_norm": (40,)}, n_ff=23
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_other_hyper_parameters(tmp_path: Path, name: str) -> None:
    arch = SHAPES[name]
    keys = {"attention.key_length": arch.head_dim, "attention.value_length": arch.head_dim} | dict(arch.keys)
    path, ids, found = replace(arch, keys=keys).write(tmp_path / "tiny.gguf"), tokens(), {}
    for device in ("cpu", "reference"):
        with LLM(path, device=device, kv_cache_dtype="f32", max_num_batched_tokens=11, skip_tokenizer_init=True) as llm:
            found[device] = llm.logits(ids)
    assert found["reference"].std() > 0.05
    assert nmse(found["cpu"], found["reference"]) < 1e-9
