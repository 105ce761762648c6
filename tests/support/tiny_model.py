"""A whole model in a few hundred kilobytes: random weights, a token for each byte, a chat template.

    path = write_tiny_model(tmp_path / "tiny.gguf")
    llm = LLM(path, device="reference")

Its text is noise, but a noise that depends on every token of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.gguf_builder import INT32, STRING, GGUFBuilder

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 256 + len(CONTROL_TOKENS)
END_ID = VOCAB_SIZE - 1
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_NORMAL, _CONTROL = 1, 3


def write_tiny_model(
    path: Path,
    *,
    name: str | bytes = "tiny",
    layers: int = 2,
    width: int = 64,
    context: int = 512,
    fmt: str = "F32",
    template: str | bytes | None = TEMPLATE,
    seed: int = 0,
    keys: Mapping[str, Any] | None = None,
    biases: bool = False,
) -> Path:
    """Write a llama with grouped-query attention (heads of 16, two for each KV head) and return its path.

    ``keys`` are more of its metadata. With ``biases`` Q, K and V have them, as in Qwen2.
    ``fmt`` is the format of the matrices; F32, F16 and the formats with blocks of 32 fit a ``width`` of 64.
    """
    builder, rng = GGUFBuilder(), np.random.default_rng(seed)
    _add_hyper_parameters(builder, name, layers, width, context)
    for key, value in (keys or {}).items():
        builder.add(key, value)
    _add_tokenizer(builder, template)
    shapes = {
        "attn_q": (width, width),
        "attn_k": (width // 2, width),
        "attn_v": (width // 2, width),
        "attn_output": (width, width),
        "ffn_gate": (2 * width, width),
        "ffn_up": (2 * width, width),
        "ffn_down": (width, 2 * width),
    }
    builder.add_random_tensor("token_embd.weight", (VOCAB_SIZE, width), fmt, rng, std=0.5)
    builder.add_tensor("output_norm.weight", np.ones(width))
    for i in range(layers):
        for matrix, shape in shapes.items():
            builder.add_random_tensor(f"blk.{i}.{matrix}.weight", shape, fmt, rng, std=0.25)
        for matrix in ("attn_q", "attn_k", "attn_v") if biases else ():
            builder.add_tensor(f"blk.{i}.{matrix}.bias", rng.standard_normal(shapes[matrix][0]))
        for norm in ("attn_norm", "ffn_norm"):
            builder.add_tensor(f"blk.{i}.{norm}.weight", np.ones(width))
    return builder.write(path)


def byte_letters() -> list[str]:
    """For each byte, the letter that byte-level BPE writes for it (GPT-2's ``bytes_to_unicode``)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def _add_hyper_parameters(builder: GGUFBuilder, name: str | bytes, layers: int, width: int, context: int) -> None:
    builder.add("general.architecture", "llama")
    builder.add("general.name", name, STRING)
    numbers = {
        "embedding_length": width,
        "block_count": layers,
        "feed_forward_length": 2 * width,
        "attention.head_count": width // 16,
        "attention.head_count_kv": width // 32,
        "context_length": context,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    for key, value in numbers.items():
        builder.add(f"llama.{key}", value)


def _add_tokenizer(builder: GGUFBuilder, template: str | bytes | None) -> None:
    builder.add("tokenizer.ggml.model", "gpt2")
    builder.add("tokenizer.ggml.pre", "gpt-2")
    builder.add("tokenizer.ggml.tokens", [*byte_letters(), *CONTROL_TOKENS])
    builder.add("tokenizer.ggml.token_type", [_NORMAL] * 256 + [_CONTROL] * len(CONTROL_TOKENS), INT32)
    builder.add("tokenizer.ggml.merges", [], STRING)
    builder.add("tokenizer.ggml.eos_token_id", END_ID)
    if template is not None:
        builder.add("tokenizer.chat_template", template, STRING)
