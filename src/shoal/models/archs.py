"""Which architectures there are: one row of data each, made of named pieces.

What a file shows by itself is not said here: biases, fused or separate matrices, tied heads, a second norm, sizes. A tensor that
no piece asks for is refused at load, so a row that leaves one out cannot go unnoticed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shoal.kernels.base import Activation, Routing


@dataclass(frozen=True, slots=True)
class Windows:
    """Sliding windows: layer i has one iff i % ``period`` < ``period`` - 1. ``rope_base``: the base of windowed layers, which then
    have no rope scaling either (None: as everywhere). ``rope_only``: other layers are not rotated at all."""

    period: int
    rope_base: float | None = None
    rope_only: bool = False


@dataclass(frozen=True, slots=True)
class Arch:
    """What sets an architecture apart from llama.

    ``rope``: rotary pairs are (2i, 2i + 1) for norm, (i, i + n) for neox. ``gated``: the MLP has a gate. ``norms`` says where a
    branch is normalised: its input, its output before it is added, or both. ``qk_norm``, ``sub_norm``: there may be norms of q and k
    before rotation, of what goes into the last matrix of a branch. ``parallel``: both branches read the layer's input; of
    ``maybe``, the file says so. ``alibi``: the greatest bias where no key says so (0: none). ``routing``: of experts, if any.
    ``shared_expert``: next to them, with a gate of its own or without. ``latent``: K and V come from one latent vector (DeepSeek-V2).
    """

    norm: Literal["rms", "layer"] = "rms"
    norms: Literal["before", "after", "both"] = "before"
    rope: Literal["norm", "neox", "none"] = "norm"
    activation: Activation = "silu"
    gated: bool = True
    parallel: Literal["no", "yes", "maybe"] = "no"
    qk_norm: bool = False
    sub_norm: bool = False
    alibi: float = 0.0
    learned_positions: bool = False
    embedding_norm: bool = False
    scaled_embedding: bool = False  # by the root of its width
    attention_cap: float = 0.0  # where the file has no key
    final_cap: float = 0.0
    windows: Windows | None = None
    unrotated_period: int = 0  # every so many layers, one is not rotated
    logit_scale: Literal["none", "multiply", "divide"] = "none"
    routing: Routing | None = None
    shared_expert: Literal["none", "gated", "plain"] = "none"
    latent: bool = False


_MIXTRAL = Routing(used=0)
_NOT_RENORMALISED = Routing(used=0, renormalise=False)

ARCHS: dict[str, Arch] = {
    "llama": Arch(routing=_MIXTRAL),
    "qwen2": Arch(rope="neox"),
    "qwen2moe": Arch(rope="neox", routing=_NOT_RENORMALISED, shared_expert="gated"),
    "qwen3": Arch(rope="neox", qk_norm=True),
    "qwen3moe": Arch(rope="neox", qk_norm=True, routing=_MIXTRAL),
    "gemma": Arch(rope="neox", activation="gelu", scaled_embedding=True),
    "gemma2": Arch(
        norms="both",
        rope="neox",
        activation="gelu",
        scaled_embedding=True,
        attention_cap=50.0,
        final_cap=30.0,
        windows=Windows(period=2),
    ),
    "gemma3": Arch(
        norms="both",
        rope="neox",
        activation="gelu",
        scaled_embedding=True,
        qk_norm=True,
        windows=Windows(period=6, rope_base=10000.0),
    ),
    "phi2": Arch(norm="layer", rope="neox", activation="gelu", gated=False, parallel="yes"),
    "phi3": Arch(rope="neox"),
    "gpt2": Arch(norm="layer", rope="none", activation="gelu", gated=False, learned_positions=True),
    "gptneox": Arch(norm="layer", rope="neox", activation="gelu", gated=False, parallel="maybe"),
    "falcon": Arch(norm="layer", rope="neox", activation="gelu", gated=False, parallel="yes"),
    "stablelm": Arch(norm="layer", rope="neox", parallel="maybe", qk_norm=True),
    "starcoder2": Arch(norm="layer", rope="neox", activation="gelu", gated=False),
    "mpt": Arch(norm="layer", rope="none", activation="gelu", gated=False, alibi=8.0),
    "bloom": Arch(norm="layer", rope="none", activation="gelu", gated=False, alibi=8.0, embedding_norm=True),
    "olmo2": Arch(norms="after", rope="neox", qk_norm=True),
    "granite": Arch(logit_scale="divide"),
    "smollm3": Arch(unrotated_period=4),
    "bitnet": Arch(rope="neox", sub_norm=True),
    "bitnet-b1.58": Arch(rope="neox", sub_norm=True, activation="relu2"),
    "bitnet-25": Arch(rope="neox", sub_norm=True, activation="relu2"),
    "command-r": Arch(norm="layer", parallel="yes", qk_norm=True, logit_scale="multiply"),
    "cohere2": Arch(norm="layer", parallel="yes", logit_scale="multiply", windows=Windows(period=4, rope_only=True)),
    "exaone": Arch(rope="neox"),
    "internlm2": Arch(),
    "glm4": Arch(norms="both"),
    "deepseek": Arch(routing=_NOT_RENORMALISED, shared_expert="plain"),
    "deepseek2": Arch(routing=_NOT_RENORMALISED, shared_expert="plain", latent=True),
}
