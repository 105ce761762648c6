"""Which architectures there are: one row of data each, made of named pieces.

What a file shows by itself is not said here: biases, fused or separate matrices, tied heads, a second norm, sizes. A tensor that
no piece asks for is refused at load, so a row that leaves one out cannot go unnoticed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from shoal.kernels.base import Activation, Routing


@dataclass(frozen=True, slots=True)
class Windows:
    """Sliding windows: layer i has one iff i % ``period`` < ``period`` - 1. ``size``: where no key says so (0: then there are none;
    None: the key must be there). ``rope_base``: the base of windowed layers, which then have no rope scaling either (0: the model's
    base; None: as everywhere). ``rope_only``: other layers are not rotated at all."""

    period: int
    size: int | None = None
    rope_base: float | None = None
    rope_only: bool = False


@dataclass(frozen=True, slots=True)
class Arch:
    """What sets an architecture apart from llama.

    ``rope``: rotary pairs are (2i, 2i + 1) for norm, (i, i + n) for neox. ``gated``: the MLP has a gate. ``norms`` says where a
    branch is normalised: its input, its output before it is added, or both; ``mlp_norm`` is the name of the norm of the MLP's input,
    and norms may be ``weightless``. ``qk_norm``, ``sub_norm``: there may be norms of q and k
    before rotation, of what goes into the last matrix of a branch. ``parallel``: both branches read the layer's input; of
    ``maybe``, the file says so. ``alibi``: the greatest bias where no key says so (0: none). ``routing``: of experts, if any.
    ``shared_expert``: next to them, with a gate of its own or without. ``latent``: K and V come from one latent vector (DeepSeek-V2).
    ``encoder``: a BERT (models/encoder.py): every token sees all others, norms follow the sums, and a state for each token comes out;
    of the pieces above it has ``rope``, ``alibi``, ``learned_positions``, ``qk_norm``, ``activation`` and ``gated`` ("maybe": the
    file's tensors say so).
    """

    norm: Literal["rms", "layer"] = "rms"
    norms: Literal["before", "after", "both"] = "before"
    mlp_norm: str = "ffn_norm"
    weightless: bool = False
    rope: Literal["norm", "neox", "none"] = "norm"
    activation: Activation = "silu"
    gated: bool | Literal["maybe"] = True
    halved_ff: bool = False  # feed_forward_length counts the gate and the rest
    parallel: Literal["no", "yes", "maybe"] = "no"
    qk_norm: bool = False
    sub_norm: bool = False
    alibi: float = 0.0
    learned_positions: bool = False
    embedding_norm: bool = False
    scaled_embedding: bool = False  # by the root of its width
    scaled_by_size: bool = False  # MiniCPM: factors follow from depth and width where the file has no key
    rope_switch: bool = False  # Granite: rope.scaling.finetuned false means no rotation
    unrooted_scale: bool = False  # scores are divided by the size of a head, not by its root
    attention_cap: float = 0.0  # where the file has no key
    final_cap: float = 0.0
    windows: Windows | None = None
    unrotated_period: int = 0  # every so many layers, one is not rotated
    logit_scale: Literal["none", "multiply", "divide"] = "none"
    routing: Routing | None = None
    shared_expert: Literal["none", "gated", "plain"] = "none"
    latent: bool = False
    encoder: bool = False


_MIXTRAL = Routing(used=0)
_NOT_RENORMALISED = Routing(used=0, renormalise=False)
_SIGMOID = Routing(used=0, gating="sigmoid")

ARCHS: dict[str, Arch] = {
    "llama": Arch(routing=_MIXTRAL),
    "qwen": Arch(rope="neox", halved_ff=True),
    "qwen2": Arch(rope="neox"),
    "qwen2vl": Arch(rope="neox"),  # for text: its three positions of a token are the same
    "qwen2moe": Arch(rope="neox", routing=_NOT_RENORMALISED, shared_expert="gated"),
    "qwen3": Arch(rope="neox", qk_norm=True),
    "qwen3moe": Arch(rope="neox", qk_norm=True, routing=_MIXTRAL),
    "qwen3vl": Arch(rope="neox", qk_norm=True),
    "qwen3vlmoe": Arch(rope="neox", qk_norm=True, routing=_MIXTRAL),
    "gemma": Arch(rope="neox", activation="gelu", scaled_embedding=True),
    "gemma2": Arch(
        norms="both",
        rope="neox",
        activation="gelu",
        scaled_embedding=True,
        attention_cap=50.0,
        final_cap=30.0,
        windows=Windows(period=2, size=4096),
    ),
    "gemma3": Arch(
        norms="both",
        rope="neox",
        activation="gelu",
        scaled_embedding=True,
        qk_norm=True,
        windows=Windows(period=6, size=0, rope_base=10000.0),
    ),
    "phi2": Arch(norm="layer", rope="neox", activation="gelu", gated=False, parallel="yes"),
    "phi3": Arch(rope="neox"),
    # Norms in the file have biases; the model was trained with LayerNorm, llama.cpp computes RMSNorm.
    "phimoe": Arch(rope="neox", routing=_MIXTRAL),
    "gpt2": Arch(norm="layer", rope="none", activation="gelu", gated=False, learned_positions=True),
    "gptneox": Arch(norm="layer", rope="neox", activation="gelu", gated=False, parallel="maybe"),
    "falcon": Arch(norm="layer", rope="neox", activation="gelu", gated=False, parallel="yes"),
    "stablelm": Arch(norm="layer", rope="neox", parallel="maybe", qk_norm=True),
    "starcoder": Arch(norm="layer", rope="none", activation="gelu", gated=False, learned_positions=True),
    "starcoder2": Arch(norm="layer", rope="neox", activation="gelu", gated=False),
    "mpt": Arch(norm="layer", rope="none", activation="gelu", gated=False, alibi=8.0),
    "bloom": Arch(norm="layer", rope="none", activation="gelu", gated=False, alibi=8.0, embedding_norm=True),
    "codeshell": Arch(norm="layer", rope="neox", activation="gelu", gated=False),
    "refact": Arch(rope="none", alibi=8.0),
    "jais": Arch(norm="layer", rope="none", alibi=8.0, unrooted_scale=True),
    "jais2": Arch(norm="layer", rope="neox", activation="relu2", gated=False),
    "nemotron": Arch(norm="layer", rope="neox", activation="relu2", gated=False),
    "arcee": Arch(activation="relu2", gated=False),
    "olmo": Arch(norm="layer", weightless=True),
    "olmo2": Arch(norms="after", rope="neox", qk_norm=True, windows=Windows(period=4, size=0, rope_base=0.0)),
    "olmoe": Arch(rope="neox", qk_norm=True, routing=_NOT_RENORMALISED),
    "granite": Arch(logit_scale="divide", rope_switch=True),
    "granitemoe": Arch(logit_scale="divide", rope_switch=True, routing=_MIXTRAL, shared_expert="plain"),
    "minicpm": Arch(logit_scale="divide", scaled_by_size=True),
    "smollm3": Arch(unrotated_period=4),
    "bitnet": Arch(rope="neox", sub_norm=True),
    "bitnet-b1.58": Arch(rope="neox", sub_norm=True, activation="relu2"),
    "bitnet-25": Arch(rope="neox", sub_norm=True, activation="relu2"),
    "command-r": Arch(norm="layer", parallel="yes", qk_norm=True, logit_scale="multiply"),
    "cohere2": Arch(norm="layer", parallel="yes", logit_scale="multiply", windows=Windows(period=4, rope_only=True)),
    "exaone": Arch(rope="neox"),
    "exaone4": Arch(norms="after", rope="neox", qk_norm=True),
    "internlm2": Arch(),
    "mistral3": Arch(routing=_MIXTRAL),
    "orion": Arch(norm="layer", rope="neox"),
    "xverse": Arch(),
    "baichuan": Arch(),
    "plamo": Arch(parallel="yes", rope="neox"),
    "ernie4_5": Arch(),
    "ernie4_5-moe": Arch(routing=_MIXTRAL, shared_expert="plain"),
    "seed_oss": Arch(rope="neox", mlp_norm="post_attention_norm"),
    "pangu-embedded": Arch(rope="neox"),
    "chatglm": Arch(),
    "glm4": Arch(norms="both"),
    "glm4moe": Arch(
        rope="neox",
        qk_norm=True,
        mlp_norm="post_attention_norm",
        routing=Routing(used=0, gating="sigmoid", renormalise=False),
        shared_expert="plain",
    ),
    "minimax-m2": Arch(rope="neox", qk_norm=True, routing=_SIGMOID),
    "dbrx": Arch(norm="layer", rope="neox", mlp_norm="attn_output_norm", routing=_MIXTRAL),
    "dots1": Arch(rope="neox", qk_norm=True, routing=_NOT_RENORMALISED, shared_expert="plain"),
    "bailingmoe": Arch(routing=_NOT_RENORMALISED, shared_expert="plain"),
    "bailingmoe2": Arch(rope="neox", qk_norm=True, routing=_NOT_RENORMALISED, shared_expert="plain"),
    "deepseek": Arch(routing=_NOT_RENORMALISED, shared_expert="plain"),
    "deepseek2": Arch(routing=_NOT_RENORMALISED, shared_expert="plain", latent=True),
    "bert": Arch(encoder=True, norm="layer", rope="none", learned_positions=True, activation="gelu", gated=False),
    "nomic-bert": Arch(encoder=True, norm="layer", rope="neox"),
    "jina-bert-v2": Arch(
        encoder=True, norm="layer", rope="none", alibi=8.0, qk_norm=True, activation="gelu", gated="maybe"
    ),
    "jina-bert-v3": Arch(encoder=True, norm="layer", rope="neox", activation="gelu", gated=False),
}

# What llama.cpp knows by the number of layers alone.
SIZES: dict[tuple[str, int], Arch] = {
    ("baichuan", 40): Arch(rope="none", alibi=8.0),  # 13B
    ("exaone4", 64): replace(ARCHS["exaone4"], windows=Windows(period=4, size=4096, rope_only=True)),  # 32B
}


def arch_of(name: str, n_layers: int) -> Arch:
    """The row of an architecture, for a model of that many layers. Raises KeyError for a name that is not known."""
    return SIZES.get((name, n_layers), ARCHS[name])
