"""One tiny model for each architecture (or variant) that has no file of its own among the shared golden data.

They are made anew each time, from a fixed seed; what llama.cpp computes for them is in ``tests/conformance/archs``. Widths are odd,
epsilons large, biases large and norms away from 1, so that a piece that is left out or in the wrong place shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.gguf_builder import GGUFBuilder

VOCAB = 48
TOKENS = 24
CONTEXT = 64
DEEP = 20  # layers, from where on rounding grows so much that only exact arithmetic says anything
_EPSILON = 0.01
_EXPERTS, _USED = 6, 2

LLAMA = "attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_up ffn_down"
LLAMA_HALVES = LLAMA.replace("attn_q attn_k attn_v", "attn_qkv*")
MLP = "ffn_gate ffn_up ffn_down"
EXPERTS = "ffn_gate_inp ffn_gate_exps ffn_up_exps ffn_down_exps"
SHARED = "ffn_gate_shexp ffn_up_shexp ffn_down_shexp"
POST_NORMED = f"attn_q attn_k attn_v attn_output post_attention_norm {MLP} post_ffw_norm"
GEMMA = f"{LLAMA} post_attention_norm post_ffw_norm"
GLM = "attn_norm attn_q* attn_k* attn_v* attn_output attn_q_norm attn_k_norm post_attention_norm"
LATENT = "attn_norm attn_q_a attn_q_a_norm attn_q_b attn_kv_a_mqa attn_kv_a_norm attn_kv_b attn_output ffn_norm"
GPT = "attn_norm* attn_qkv* attn_output* ffn_norm* ffn_up* ffn_down*"


@dataclass(frozen=True)
class TinyArch:
    """A model to make. ``layer`` and ``ends`` name the tensors of a layer and of the whole model, without .weight; those with a star
    have a bias too, those that end in .bias are one. ``first_layers``: what the first ones have instead. ``shapes`` are those that
    do not follow from the sizes, ``keys`` what stands in the metadata besides the sizes, without the architecture's name."""

    architecture: str
    layer: str
    ends: str = "token_embd output_norm output"
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 10
    n_embd: int = 40
    n_ff: int = 36
    keys: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    first_layers: tuple[str, ...] = ()
    layer_norm: bool = False
    gelu: bool = False

    @property
    def has_experts(self) -> bool:
        """Whether some MLPs are mixtures."""
        return "ffn_gate_inp" in self.layer

    def write(self, path: Path) -> Path:
        """Write the model: a GGUF file of F32 tensors without a tokenizer."""
        builder, rng = GGUFBuilder(), np.random.default_rng(7)
        self._add_keys(builder)
        names = self.ends.split()
        for i in range(self.layers):
            layer = self.first_layers[i] if i < len(self.first_layers) else self.layer
            names += [f"blk.{i}.{name}" for name in layer.split()]
        for name in names:
            if not name.endswith(".bias"):
                self._add_tensor(builder, name.rstrip("*") + ".weight", rng)
            if name.endswith(("*", ".bias")):
                self._add_tensor(builder, name.rstrip("*").removesuffix(".bias") + ".bias", rng)
        return builder.write(path)

    def _add_keys(self, builder: GGUFBuilder) -> None:
        builder.add("general.architecture", self.architecture)
        self._add_tokenizer(builder)
        keys = {
            "vocab_size": VOCAB,
            "block_count": self.layers,
            "context_length": CONTEXT,
            "embedding_length": self.n_embd,
            "feed_forward_length": self.n_ff,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            f"attention.layer_norm{'' if self.layer_norm else '_rms'}_epsilon": _EPSILON,
        }
        if self.has_experts:
            keys |= {"expert_count": _EXPERTS, "expert_used_count": _USED}
        for key, value in (keys | dict(self.keys)).items():
            builder.add(f"{self.architecture}.{key}", value)

    def _add_tokenizer(self, builder: GGUFBuilder) -> None:
        builder.add("tokenizer.ggml.model", "no_vocab")

    def _add_tensor(self, builder: GGUFBuilder, name: str, rng: np.random.Generator) -> None:
        *_, base, suffix = name.split(".")
        shape = self.shapes.get(base) or self._shape(base)
        if suffix == "bias":
            values = _uniform(rng, shape[:1], 1.0)
        elif len(shape) == 1 or base in ("attn_q_norm", "attn_k_norm"):
            values = 1.0 + _uniform(rng, shape, 0.5)
        else:
            values = _uniform(rng, shape, 1.0 if base == "token_embd" else 2.5 / shape[-1] ** 0.5)
        builder.add_tensor(name, values)

    def _shape(self, base: str) -> tuple[int, ...]:
        width, ff = self.n_embd, self.n_ff
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {
            "token_embd": (VOCAB, width),
            "output": (VOCAB, width),
            "position_embd": (CONTEXT, width),
            "attn_q": (q, width),
            "attn_k": (kv, width),
            "attn_v": (kv, width),
            "attn_qkv": (q + 2 * kv, width),
            "attn_q_norm": (self.head_dim,),
            "attn_k_norm": (self.head_dim,),
            "attn_output": (width, q),
            "ffn_gate_inp": (_EXPERTS, width),
            "exp_probs_b": (_EXPERTS,),
            "ffn_gate_up_exps": (_EXPERTS, 2 * ff, width),
            "eh_proj": (width, 2 * width),
        }
        for name in ("", "_shexp"):
            shapes |= {f"ffn_{part}{name}": (ff, width) for part in ("gate", "up")} | {f"ffn_down{name}": (width, ff)}
        shapes |= {f"ffn_{part}_exps": (_EXPERTS, ff, width) for part in ("gate", "up")}
        return shapes.get(base) or ((_EXPERTS, width, ff) if base == "ffn_down_exps" else (width,))


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], limit: float) -> NDArray[np.float64]:
    return limit * (2 * rng.random(shape) - 1)


def tokens(seed: int = 3) -> list[int]:
    """The prompt of all of them."""
    return [int(i) for i in np.random.default_rng(seed).integers(0, VOCAB, TOKENS)]


def digest(path: Path) -> str:
    """What tells one file from another."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


TINY_ARCHS = {
    "starcoder": TinyArch(
        "starcoder", GPT, "token_embd position_embd output_norm* output", kv_heads=1, layer_norm=True, gelu=True
    ),
    "olmo": TinyArch(
        "olmo",
        LLAMA.replace("attn_norm ", "").replace("ffn_norm ", ""),
        "token_embd",
        keys={"attention.clamp_kqv": 0.7},
        layer_norm=True,
    ),
    "olmoe": TinyArch(
        "olmoe",
        f"{LLAMA.removesuffix(MLP)} attn_q_norm attn_k_norm {EXPERTS}",
        shapes={"attn_q_norm": (40,), "attn_k_norm": (40,)},
        kv_heads=4,
    ),
    "granitemoe": TinyArch(
        "granitemoe",
        f"{LLAMA.removesuffix(MLP)} {EXPERTS} {SHARED}",
        "token_embd output_norm",
        keys={
            "logit_scale": 3.0,
            "residual_scale": 0.4,
            "embedding_scale": 2.5,
            "attention.scale": 0.2,
            "expert_shared_feed_forward_length": 36,
        },
    ),
    "granitemoe_bare": TinyArch("granitemoe", f"{LLAMA.removesuffix(MLP)} {EXPERTS}", keys={"logit_scale": 2.0}),
    "orion": TinyArch(
        "orion", LLAMA.replace("norm", "norm*"), "token_embd output_norm* output", kv_heads=4, layer_norm=True
    ),
    "xverse": TinyArch("xverse", LLAMA),
    "baichuan_7b": TinyArch("baichuan", LLAMA, layers=32, kv_heads=4, head_dim=4, n_embd=16, n_ff=12),
    "baichuan_13b": TinyArch("baichuan", LLAMA, layers=40, heads=3, kv_heads=3, head_dim=4, n_embd=12, n_ff=12),
    "qwen": TinyArch("qwen", LLAMA_HALVES, kv_heads=4, keys={"feed_forward_length": 72}),
    "minicpm": TinyArch("minicpm", LLAMA, keys={"logit_scale": 4.0, "residual_scale": 0.3, "embedding_scale": 5.0}),
    "minicpm_bare": TinyArch("minicpm", LLAMA),
    "nemotron": TinyArch(
        "nemotron",
        "attn_norm* attn_q* attn_k* attn_v* attn_output* ffn_norm* ffn_up* ffn_down*",
        "token_embd output_norm* output",
        keys={"rope.dimension_count": 6},
        layer_norm=True,
    ),
    "arcee": TinyArch(
        "arcee",
        LLAMA.replace("ffn_gate ", ""),
        "token_embd output_norm",
        head_dim=14,
        keys={"attention.key_length": 14, "attention.value_length": 14, "rope.dimension_count": 14},
    ),
    "seed_oss": TinyArch(
        "seed_oss",
        "attn_norm attn_q* attn_k* attn_v* attn_output post_attention_norm ffn_gate ffn_up ffn_down",
        head_dim=14,
        keys={"attention.key_length": 14, "attention.value_length": 14, "rope.dimension_count": 14},
    ),
    "ernie4_5": TinyArch("ernie4_5", LLAMA, "token_embd output_norm"),
    "ernie4_5-moe": TinyArch(
        "ernie4_5-moe",
        f"{LLAMA.removesuffix(MLP)} {EXPERTS} exp_probs_b.bias {SHARED}",
        layers=3,
        first_layers=(LLAMA,),
        keys={
            "leading_dense_block_count": 1,
            "interleave_moe_layer_step": 1,
            "expert_feed_forward_length": 36,
            "expert_shared_feed_forward_length": 36,
            "expert_shared_count": 1,
        },
    ),
    "chatglm": TinyArch(
        "chatglm",
        "attn_norm attn_qkv* attn_output ffn_norm ffn_up ffn_down",
        shapes={"ffn_up": (72, 40)},
        keys={"rope.dimension_count": 6},
    ),
    "codeshell": TinyArch("codeshell", GPT, "token_embd output_norm* output", layer_norm=True, gelu=True),
    "refact": TinyArch("refact", LLAMA, heads=6, kv_heads=1, head_dim=6, n_embd=36),
    "jais": TinyArch(
        "jais",
        "attn_norm* attn_qkv* attn_output* ffn_norm* ffn_gate* ffn_up* ffn_down*",
        "token_embd output_norm* output",
        heads=6,
        kv_heads=6,
        head_dim=6,
        n_embd=36,
        keys={"attention.max_alibi_bias": 6.0},
        layer_norm=True,
    ),
    "plamo": TinyArch("plamo", LLAMA.replace("ffn_norm ", "")),
    "exaone4": TinyArch(
        "exaone4",
        f"{POST_NORMED} attn_q_norm attn_k_norm",
    ),
    "exaone4_32b": TinyArch(
        "exaone4",
        f"{POST_NORMED} attn_q_norm attn_k_norm",
        layers=64,
        heads=2,
        kv_heads=1,
        head_dim=6,
        n_embd=12,
        n_ff=8,
        keys={"attention.sliding_window": 7},
    ),
    "dots1": TinyArch(
        "dots1",
        f"{LLAMA.removesuffix(MLP)} attn_q_norm attn_k_norm {EXPERTS} exp_probs_b.bias {SHARED}",
        kv_heads=4,
        layers=3,
        first_layers=(f"{LLAMA} attn_q_norm attn_k_norm",),
        keys={
            "leading_dense_block_count": 1,
            "expert_feed_forward_length": 36,
            "expert_shared_count": 1,
            "expert_weights_scale": 2.5,
            "expert_weights_norm": True,
            "expert_gating_func": 2,
        },
    ),
    "bailingmoe": TinyArch(
        "bailingmoe",
        f"{LLAMA.removesuffix(MLP)} {EXPERTS} {SHARED}",
        keys={
            "leading_dense_block_count": 0,
            "expert_feed_forward_length": 36,
            "expert_shared_count": 1,
            "expert_weights_scale": 1.5,
            "expert_weights_norm": True,
            "rope.dimension_count": 10,
        },
    ),
    "glm4moe": TinyArch(
        "glm4moe",
        f"{GLM} {EXPERTS} exp_probs_b.bias {SHARED}",
        layers=3,
        first_layers=(f"{GLM} {MLP}",),
        keys={
            "leading_dense_block_count": 1,
            "expert_feed_forward_length": 36,
            "expert_shared_count": 1,
            "expert_weights_scale": 1.5,
            "expert_weights_norm": True,
            "rope.dimension_count": 6,
        },
    ),
    "minimax-m2": TinyArch(
        "minimax-m2",
        f"{LLAMA.removesuffix(MLP)} attn_q_norm attn_k_norm {EXPERTS} exp_probs_b.bias",
        shapes={"attn_q_norm": (40,), "attn_k_norm": (20,)},
        keys={"expert_feed_forward_length": 36, "expert_gating_func": 2, "rope.dimension_count": 6},
    ),
    "phimoe": TinyArch(
        "phimoe",
        f"attn_norm* attn_q* attn_k* attn_v* attn_output* ffn_norm* {EXPERTS}",
        "token_embd output_norm* output*",
    ),
    "dbrx": TinyArch(
        "dbrx",
        f"attn_norm attn_qkv attn_output attn_output_norm {EXPERTS}",
        keys={"attention.clamp_kqv": 1.5},
        layer_norm=True,
    ),
    "qwen2vl": TinyArch(
        "qwen2vl",
        "attn_norm attn_q* attn_k* attn_v* attn_output ffn_norm ffn_gate ffn_up ffn_down",
        # llama.cpp does not read this one's epsilon: small ones hide it.
        keys={"rope.dimension_sections": [1, 2, 2, 0], "attention.layer_norm_rms_epsilon": 1e-6},
    ),
    "qwen3vl": TinyArch("qwen3vl", f"{LLAMA} attn_q_norm attn_k_norm", keys={"rope.dimension_sections": [2, 2, 1, 0]}),
    "qwen3vlmoe": TinyArch(
        "qwen3vlmoe",
        f"{LLAMA.removesuffix(MLP)} attn_q_norm attn_k_norm {EXPERTS}",
        keys={"rope.dimension_sections": [2, 2, 1, 0], "expert_feed_forward_length": 36},
    ),
    "jais2": TinyArch(
        "jais2",
        "attn_norm* attn_q* attn_k* attn_v* attn_output* ffn_norm* ffn_up* ffn_down*",
        "token_embd output_norm* output",
        layer_norm=True,
    ),
    "pangu-embedded": TinyArch(
        "pangu-embedded",
        "attn_norm attn_q* attn_k* attn_v* attn_output* ffn_norm ffn_gate ffn_up ffn_down",
    ),
    # Variants of architectures that the shared golden data has, as real files come.
    "llama_fused": TinyArch(
        "llama",
        LLAMA.replace("attn_q attn_k attn_v", "attn_qkv"),
        keys={"attention.head_count_kv": [2, 2], "feed_forward_length": [36, 36], "attention.sliding_window": 7},
    ),
    "mistral3": TinyArch(
        "mistral3",
        LLAMA,
        keys={
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.yarn_log_multiplier": 1.0,
            "attention.temperature_scale": 0.1,
        },
    ),
    "olmo3": TinyArch(
        "olmo2",
        f"{POST_NORMED} attn_q_norm attn_k_norm",
        layers=5,
        keys={
            "attention.sliding_window": 7,
            "attention.sliding_window_pattern": [True, True, True, False, True],
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
        },
        shapes={"attn_q_norm": (40,), "attn_k_norm": (20,)},
    ),
    "phi3_separate": TinyArch(
        "phi3",
        "attn_norm attn_q* attn_k* attn_v* attn_output ffn_norm ffn_up ffn_down",
        "token_embd output_norm",
        shapes={"ffn_up": (72, 40)},
        keys={"attention.sliding_window": 7},
    ),
    "gemma2_27b": TinyArch(
        "gemma2",
        GEMMA,
        "token_embd output_norm",
        layers=46,
        heads=2,
        kv_heads=1,
        head_dim=8,
        n_embd=12,
        n_ff=8,
        keys={"attention.key_length": 8, "attention.value_length": 8},
        gelu=True,
    ),
    "gemma3_27b": TinyArch(
        "gemma3",
        f"{GEMMA} attn_q_norm attn_k_norm",
        "token_embd output_norm",
        layers=62,
        heads=2,
        kv_heads=1,
        head_dim=8,
        n_embd=12,
        n_ff=8,
        keys={"attention.key_length": 8, "attention.value_length": 8, "attention.sliding_window": 7},
        gelu=True,
    ),
    "gemma3_unwindowed": TinyArch("gemma3", f"{GEMMA} attn_q_norm attn_k_norm", "token_embd output_norm", gelu=True),
    "granite_unrotated": TinyArch("granite", LLAMA, keys={"logit_scale": 2.0, "rope.scaling.finetuned": False}),
    "command_r_plus": TinyArch(
        "command-r",
        "attn_norm attn_q attn_k attn_v attn_output attn_q_norm attn_k_norm ffn_gate ffn_up ffn_down",
        "token_embd output_norm",
        layers=64,
        heads=2,
        kv_heads=1,
        head_dim=6,
        n_embd=12,
        n_ff=8,
        keys={"logit_scale": 0.5},
        shapes={"attn_q_norm": (2, 6), "attn_k_norm": (1, 6)},
        layer_norm=True,
    ),
    "bailingmoe2": TinyArch(
        "bailingmoe2",
        f"attn_norm attn_qkv attn_output attn_q_norm attn_k_norm ffn_norm {EXPERTS} exp_probs_b.bias {SHARED}",
        layers=3,
        first_layers=(f"attn_norm attn_qkv attn_output attn_q_norm attn_k_norm ffn_norm {MLP}",),
        keys={
            "leading_dense_block_count": 1,
            "expert_feed_forward_length": 36,
            "expert_shared_count": 1,
            "expert_weights_scale": 2.5,
            "expert_weights_norm": True,
            "expert_gating_func": 2,
            "expert_group_count": 3,
            "expert_group_used_count": 2,
            "rope.dimension_count": 6,
        },
    ),
    # Behind its layers is one that guesses a second token.
    "glm4moe_guessing": TinyArch(
        "glm4moe",
        f"{GLM} {EXPERTS} exp_probs_b.bias {SHARED} nextn.eh_proj nextn.enorm nextn.hnorm",
        layers=3,
        first_layers=(f"{GLM} {MLP}", f"{GLM} {EXPERTS} exp_probs_b.bias {SHARED}"),
        keys={
            "leading_dense_block_count": 1,
            "nextn_predict_layers": 1,
            "expert_feed_forward_length": 36,
            "expert_shared_count": 1,
            "rope.dimension_count": 6,
        },
    ),
    # Before llama.cpp stored the latent vector: one tensor for the keys and values of all heads, sizes of whole heads. Gate and up of
    # the experts in one tensor, which came later.
    "deepseek2_unsplit": TinyArch(
        "deepseek2",
        f"{LATENT} ffn_gate_inp ffn_gate_up_exps ffn_down_exps {SHARED}",
        layers=3,
        kv_heads=4,
        first_layers=(f"{LATENT} {MLP}",),
        shapes={
            "attn_q_a": (22, 40),
            "attn_q_a_norm": (22,),
            "attn_q_b": (40, 22),
            "attn_kv_a_mqa": (18, 40),
            "attn_kv_a_norm": (14,),
            "attn_kv_b": (56, 14),
            "attn_output": (40, 32),
        },
        keys={
            "leading_dense_block_count": 1,
            "attention.q_lora_rank": 22,
            "attention.kv_lora_rank": 14,
            "attention.key_length": 10,
            "attention.value_length": 8,
            "rope.dimension_count": 4,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.yarn_log_multiplier": 0.07,
            "expert_feed_forward_length": 36,
            "expert_shared_count": 1,
            "expert_weights_scale": 1.5,
        },
    ),
}
