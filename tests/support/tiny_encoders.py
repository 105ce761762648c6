"""One tiny encoder of each kind; what llama.cpp computes for them is in ``tests/conformance/encoders``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.support.gguf_builder import INT32, GGUFBuilder
from tests.support.tiny_archs import TINY_ARCHS, TinyArch

ATTENTION = "attn_q* attn_k* attn_v* attn_output* attn_output_norm*"
BERT = f"{ATTENTION} ffn_up* ffn_down* layer_output_norm*"
ENDS = "token_embd token_types token_embd_norm*"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NONE, MEAN, CLS, LAST, RANK = range(5)
_TYPES = {"token_types": (2, 40)}


@dataclass(frozen=True)
class TinyEncoder(TinyArch):
    """A TinyArch that sees all of its text at once; ``pooling`` as files number it (None: the file does not say). ``words``: its file
    has a tokenizer, whose words are made of letters from a to v. ``fmt``: the format of its layers' matrices.
    """

    kv_heads: int = 4
    layer_norm: bool = True
    gelu: bool = True
    pooling: int | None = MEAN
    words: bool = False
    fmt: str = "F32"

    def _add_keys(self, builder: GGUFBuilder) -> None:
        super()._add_keys(builder)
        builder.add("tokenizer.ggml.token_type_count", 2)
        builder.add(f"{self.architecture}.attention.causal", False)
        if self.pooling is not None:
            builder.add(f"{self.architecture}.pooling_type", self.pooling)

    def _add_tensor(self, builder: GGUFBuilder, name: str, rng: np.random.Generator) -> None:
        base = name.split(".")[-2]
        if self.fmt == "F32" or not name.startswith("blk.") or name.endswith(".bias") or "norm" in base:
            super()._add_tensor(builder, name, rng)
            return
        shape = self.shapes.get(base) or self._shape(base)
        builder.add_random_tensor(name, shape, self.fmt, rng, std=1.4 / shape[-1] ** 0.5)

    def _add_tokenizer(self, builder: GGUFBuilder) -> None:
        if not self.words:
            super()._add_tokenizer(builder)
            return
        letters = "abcdefghijklmnopqrstu"
        tokens = [*SPECIAL, *(f"\u2581{letter}" for letter in letters), *letters, "\u2581v"]
        builder.add("tokenizer.ggml.model", "bert")
        builder.add("tokenizer.ggml.tokens", tokens)
        builder.add("tokenizer.ggml.token_type", [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)), INT32)
        for name, token in (("bos", 2), ("seperator", 3), ("unknown", 1), ("padding", 0)):
            builder.add(f"tokenizer.ggml.{name}_token_id", token)


TINY_ENCODERS = {
    "bert": TinyEncoder("bert", BERT, f"{ENDS} position_embd", shapes=_TYPES),
    "bert_rank": TinyEncoder(
        "bert",
        BERT,
        f"{ENDS} position_embd cls* cls.output*",
        shapes=_TYPES | {"cls": (40, 40), "output": (1, 40)},
        pooling=RANK,
    ),
    "bert_rank_bare": TinyEncoder(
        "bert", BERT, f"{ENDS} position_embd cls.output*", shapes=_TYPES | {"output": (1, 40)}, pooling=RANK
    ),
    "nomic-bert": TinyEncoder(
        "nomic-bert",
        "attn_qkv attn_output attn_output_norm* ffn_gate ffn_up ffn_down layer_output_norm*",
        ENDS,
        shapes=_TYPES,
        gelu=False,
        pooling=NONE,
        keys={"rope.freq_base": 100.0},
    ),
    "jina-bert-v2": TinyEncoder(
        "jina-bert-v2",
        f"{ATTENTION} ffn_gate ffn_up ffn_down* layer_output_norm*",
        ENDS,
        shapes=_TYPES,
        pooling=CLS,
    ),
    "jina-bert-v2_code": TinyEncoder(
        "jina-bert-v2",
        f"{ATTENTION} attn_q_norm* attn_k_norm* attn_norm_2* ffn_up ffn_down* layer_output_norm*",
        ENDS,
        shapes=_TYPES | {"ffn_up": (72, 40), "attn_q_norm": (40,), "attn_k_norm": (40,)},
        pooling=LAST,
    ),
    "jina-bert-v3": TinyEncoder(
        "jina-bert-v3",
        "attn_qkv* attn_output* attn_output_norm* ffn_up* ffn_down* layer_output_norm*",
        ENDS,
        shapes=_TYPES,
        keys={"rope.freq_base": 100.0},
    ),
}

# What is held to llama.cpp's states: these, and decoders with either norm, learned positions, factors and caps behind the last norm.
EMBEDDING: dict[str, TinyArch] = {
    **TINY_ENCODERS,
    **{name: TINY_ARCHS[name] for name in ("starcoder", "xverse", "minicpm", "gemma3_unwindowed")},
}
