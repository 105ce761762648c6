"""A random network in a few hundred kilobytes whose tokens depend on the whole context: for tests without text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.support.gguf_builder import GGUFBuilder

VOCAB, WIDTH, HEADS, KV_HEADS, FF, LAYERS = 96, 64, 4, 2, 96, 2
WINDOW = 40  # of the first layer of the gemma2
NAN_TOKEN = VOCAB - 1


def write_network(path: Path, architecture: str, *, with_nan: bool = False) -> Path:
    """Two layers with grouped-query attention, weights large enough that tokens depend on the whole context.

    ``with_nan``: the embedding of NAN_TOKEN is NaN.
    """
    builder, rng = GGUFBuilder(), np.random.default_rng(0)
    keys = {
        "embedding_length": WIDTH,
        "block_count": LAYERS,
        "feed_forward_length": FF,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "context_length": 512,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    norms = ["attn_norm", "ffn_norm"]
    if architecture == "gemma2":
        keys["attention.sliding_window"] = WINDOW
        norms += ["post_attention_norm", "post_ffw_norm"]
    builder.add("general.architecture", architecture)
    for key, value in keys.items():
        builder.add(f"{architecture}.{key}", value)
    kv = KV_HEADS * WIDTH // HEADS
    embedding = rng.standard_normal((VOCAB, WIDTH)).astype(np.float32)
    builder.add_tensor("output.weight", embedding.copy())
    if with_nan:
        embedding[NAN_TOKEN] = np.nan
    builder.add_tensor("token_embd.weight", embedding)
    builder.add_tensor("output_norm.weight", np.ones(WIDTH))
    for i in range(LAYERS):
        shapes = {
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (kv, WIDTH),
            "attn_v": (kv, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (FF, WIDTH),
            "ffn_up": (FF, WIDTH),
            "ffn_down": (WIDTH, FF),
        }
        for name, shape in shapes.items():
            builder.add_random_tensor(f"blk.{i}.{name}.weight", shape, "F32", rng, std=0.25)
        for name in norms:
            builder.add_tensor(f"blk.{i}.{name}.weight", np.ones(WIDTH))
    return builder.write(path)
