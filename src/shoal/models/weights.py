"""Weights of a model in the backend's layout, named after what they do; what reads the same input goes into one matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shoal.errors import UnsupportedError
from shoal.gguf.reader import GGUFFile
from shoal.kernels.base import Activation, Array, AttentionShape, Backend, Experts, Heads, Linear, Matrix, Norm, Rope
from shoal.models.config import LatentConfig, ModelConfig
from shoal.models.rope import alibi_slopes, rope_of, window_rope_of
from shoal.models.tensors import Part, Progress, Tensors
from shoal.system.machine_limits import memory_room


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """A norm of some heads of q, k and v."""

    heads: Heads
    norm: Norm


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Attention of one layer: ``qkv`` gives all q heads, then k, then v. ``sub_norm`` is of what goes into ``output``."""

    shape: AttentionShape
    rope: Rope | None
    qkv: Linear
    clamp: float
    head_norms: tuple[HeadNorm, ...]
    sub_norm: Norm | None
    output: Linear


@dataclass(frozen=True, slots=True)
class LatentWeights:
    """Latent attention of one layer (models/latent.py). ``q_down`` and its norm are there if queries are made from a latent vector
    too; ``k_up`` and ``v_up`` are one matrix for each head."""

    shape: AttentionShape
    rope: Rope
    sizes: LatentConfig
    q_down: Linear | None
    q_norm: Norm | None
    q: Linear
    kv_down: Linear
    kv_norm: Norm
    k_up: tuple[Linear, ...]
    v_up: tuple[Linear, ...]
    output: Linear


@dataclass(frozen=True, slots=True)
class MLPWeights:
    """An MLP: ``up`` has the rows of the gate first if it is ``gated``. ``row_gate``: a sigmoid of the input that weighs all of it."""

    up: Linear
    gated: bool
    activation: Activation
    sub_norm: Norm | None
    row_gate: Linear | None
    down: Linear


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. A norm is None where there is none; without ``mlp_norm`` a parallel MLP reads what attention reads. The ``post``
    norms are of what a branch adds. ``mlp`` stands next to ``experts`` as the shared one, if there are any."""

    attention_norm: Norm | None
    attention: AttentionWeights | LatentWeights
    attention_post_norm: Norm | None
    mlp_norm: Norm | None
    mlp: MLPWeights | None
    experts: Experts | None
    mlp_post_norm: Norm | None


@dataclass(frozen=True, slots=True)
class EncoderLayer:
    """One layer of an encoder: x becomes ``attention_norm`` (x + attention), with a ``second_norm`` that (x + this), then ``mlp_norm``
    (that + MLP); without ``mlp_norm`` (the last layer) it is left to whoever reads the states."""

    attention: AttentionWeights
    attention_norm: Norm
    second_norm: Norm | None
    mlp: MLPWeights
    mlp_norm: Norm | None


@dataclass(frozen=True, slots=True)
class Encoder:
    """An encoder ready to run. ``type_row`` is added to every token, ``output_norm`` is the last layer's; ``classifier`` makes scores
    of a state: two matrices, tanh between them, of which one may be missing. All layers share the ``shape``, and one layer's pages."""

    config: ModelConfig
    embedding: Matrix
    type_row: Array | None
    positions: Matrix | None
    embedding_norm: Norm
    layers: tuple[EncoderLayer, ...]
    output_norm: Norm
    classifier: tuple[Linear | None, Linear | None]
    shape: AttentionShape
    nbytes: int


@dataclass(frozen=True, slots=True)
class Model:
    """A network ready to run. ``head`` multiplies by ``embedding`` itself where the file ties them; ``shape`` is that of every layer's
    keys and values; ``nbytes`` of weights in the file."""

    config: ModelConfig
    embedding: Matrix
    positions: Matrix | None
    embedding_norm: Norm | None
    layers: tuple[LayerWeights, ...]
    output_norm: Norm
    head: Linear
    shape: AttentionShape
    nbytes: int


def check_supported(file: GGUFFile, backend: Backend) -> ModelConfig:
    """The model's configuration, if shoal can run it. Raises GGUFError or UnsupportedError that says why not."""
    config = ModelConfig.from_gguf(file)
    tensors = Tensors(file, backend, pack=False)
    _loaded(tensors, config, config.context_length)
    tensors.refuse_unused(config.architecture, config.n_layers)
    return config


def load_model(
    file: GGUFFile, backend: Backend, progress: Progress | None = None, *, max_model_len: int | None = None
) -> Model | Encoder:
    """Pack every tensor once. The file's own pages are let go as soon as they are packed.

    ``max_model_len``: the most tokens a sequence will have, if that is less than the model's context. It chooses between the long and
    the short rope factors of a model that has both, as in llama.cpp.

    Raises GGUFError for missing tensors and shapes that disagree with the metadata, UnsupportedError for types, tensors and
    architectures that shoal does not run, MemoryLimitError where there is less memory than the weights take in the file.
    """
    check_supported(file, backend)
    require_memory(file, backend)
    return pack_model(file, backend, progress, max_model_len=max_model_len)


def pack_model(
    file: GGUFFile, backend: Backend, progress: Progress | None = None, *, max_model_len: int | None = None
) -> Model | Encoder:
    """The same without looking at tensors that are left over, or at how much memory there is."""
    config = ModelConfig.from_gguf(file)
    tensors = Tensors(file, backend, pack=True, progress=progress)
    return _loaded(tensors, config, max_model_len or config.context_length)


def require_memory(file: GGUFFile, backend: Backend) -> None:
    """Raise MemoryLimitError where there is less memory than the weights take in the file."""
    for owner, nbytes in weights_by_owner(file, backend).items():
        (owner.memory_room() or memory_room()).require("the weights", nbytes)


def weights_by_owner(file: GGUFFile, backend: Backend) -> dict[Backend, int]:
    """Bytes of the weights, as the file has them, that each of the backends holds that ``backend`` is made of."""
    found: dict[Backend, int] = {}
    for name, info in file.tensors.items():
        for owner in backend.owners(name):
            found[owner] = found.get(owner, 0) + info.nbytes
    return found


def _loaded(tensors: Tensors, config: ModelConfig, max_model_len: int) -> Model | Encoder:
    loader = _Loader(tensors, config, max_model_len)
    return loader.encoder() if config.arch.encoder else loader.model()


class _Loader:
    """Puts a model together from its tensors, by the pieces its architecture has."""

    def __init__(self, tensors: Tensors, config: ModelConfig, max_model_len: int) -> None:
        self.tensors, self.config = tensors, config
        self.rope = self._rope(max_model_len)
        self.window_rope = window_rope_of(config) if config.window_rope_base else self.rope

    def model(self) -> Model:
        """All of it."""
        c, arch = self.config, self.config.arch
        embedding = self.tensors.matrix([Part("token_embd", c.vocab_size)], c.n_embd)
        return Model(
            config=c,
            embedding=embedding,
            positions=self._positions() if arch.learned_positions else None,
            embedding_norm=self._norm("token_embd_norm") if arch.embedding_norm else None,
            layers=tuple(self._layer(i) for i in range(c.n_layers)),
            output_norm=self._norm("output_norm"),
            head=self._head(embedding),
            shape=self._shape(c.n_layers - 1),
            nbytes=self.tensors.total,
        )

    def encoder(self) -> Encoder:
        """All of it, if it is one."""
        c, arch = self.config, self.config.arch
        return Encoder(
            config=c,
            embedding=self.tensors.matrix([Part("token_embd", c.vocab_size)], c.n_embd),
            type_row=self._type_row(),
            positions=self._positions() if arch.learned_positions else None,
            embedding_norm=self._norm("token_embd_norm"),
            layers=tuple(self._encoder_layer(i) for i in range(c.n_layers)),
            output_norm=self._norm(f"blk.{c.n_layers - 1}.layer_output_norm"),
            classifier=self._classifier(),
            shape=self._shape(0),
            nbytes=self.tensors.total,
        )

    def _encoder_layer(self, index: int) -> EncoderLayer:
        prefix, second = f"blk.{index}.", f"blk.{index}.attn_norm_2"
        return EncoderLayer(
            attention=self._attention(prefix, index),
            attention_norm=self._norm(prefix + "attn_output_norm"),
            second_norm=self._norm(second) if second + ".weight" in self.tensors else None,
            mlp=self._mlp(prefix, "", self.config.n_ff),
            mlp_norm=self._norm(prefix + "layer_output_norm") if index + 1 < self.config.n_layers else None,
        )

    def _type_row(self) -> Array | None:
        """That of the first kind of text ("sentence A"), which llama.cpp takes for all of it."""
        if "token_types.weight" not in self.tensors:
            return None
        return self.tensors.first_row("token_types.weight", self.config.n_embd)

    def _classifier(self) -> tuple[Linear | None, Linear | None]:
        width, found = self.config.n_embd, []
        for name in ("cls", "cls.output"):
            info = self.tensors.file.tensors.get(name + ".weight")
            rows = 1 if info is None or len(info.shape) == 1 else info.shape[0]
            found.append(None if info is None else self.tensors.linear([Part(name, rows)], width))
            width = width if info is None else rows
        if self.config.pooling == "rank" and found == [None, None]:
            raise self.tensors.file.error("cls.weight", "tensor is missing, which pooling rank needs")
        return found[0], found[1]

    def _layer(self, index: int) -> LayerWeights:
        arch, prefix = self.config.arch, f"blk.{index}."
        before, after = arch.norms != "after", arch.norms != "before"
        attention = self._latent(prefix, index) if self.config.latent else self._attention(prefix, index)
        attention_norm, mlp_norm = self._norms_before(prefix) if before else (None, None)
        routed = self.config.routing is not None and index >= self.config.n_dense_layers
        return LayerWeights(
            attention_norm=attention_norm,
            attention=attention,
            attention_post_norm=self._norm(prefix + "post_attention_norm") if after else None,
            mlp_norm=mlp_norm,
            mlp=self._shared_mlp(prefix) if routed else self._mlp(prefix, "", self.config.n_ff),
            experts=self._experts(prefix) if routed else None,
            mlp_post_norm=self._norm(prefix + "post_ffw_norm") if after else None,
        )

    def _norms_before(self, prefix: str) -> tuple[Norm, Norm | None]:
        """Of attention and of the MLP. A parallel MLP may share attention's; in Falcon 40B the second norm is attention's."""
        if prefix + "attn_norm_2.weight" in self.tensors:
            return self._norm(prefix + "attn_norm_2"), self._norm(prefix + "attn_norm")
        if self.config.parallel and prefix + "ffn_norm.weight" not in self.tensors:
            return self._norm(prefix + "attn_norm"), None
        return self._norm(prefix + "attn_norm"), self._norm(prefix + self.config.arch.mlp_norm)

    def _attention(self, prefix: str, index: int) -> AttentionWeights:
        c = self.config
        q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        parts = [Part(prefix + "attn_q", q), Part(prefix + "attn_k", kv), Part(prefix + "attn_v", kv)]
        if prefix + "attn_qkv.weight" in self.tensors:
            parts = [Part(prefix + "attn_qkv", q + 2 * kv)]
        return AttentionWeights(
            shape=self._shape(index),
            rope=self._rope_of_layer(index),
            qkv=self.tensors.linear(parts, c.n_embd),
            clamp=c.clamp_qkv,
            head_norms=self._head_norms(prefix) if c.arch.qk_norm else (),
            sub_norm=self._norm(prefix + "attn_sub_norm", q) if c.arch.sub_norm else None,
            output=self.tensors.linear([Part(prefix + "attn_output", c.n_embd)], q, c.residual_factor),
        )

    def _head_norms(self, prefix: str) -> tuple[HeadNorm, ...]:
        """Norms of q and k: of every head by itself, or of all heads at once, as the size of the tensor says."""
        c, found = self.config, []
        for name, first, heads in (("attn_q_norm", 0, c.n_heads), ("attn_k_norm", c.n_heads, c.n_kv_heads)):
            info = self.tensors.file.tensors.get(f"{prefix}{name}.weight")
            if info is None:
                continue
            whole = heads > 1 and info.shape == (heads * c.head_dim,)
            count, width = (1, heads * c.head_dim) if whole else (heads, c.head_dim)
            norm = self._norm(prefix + name, width, repeat=count)
            found.append(HeadNorm(Heads(first * c.head_dim, count, width), norm))
        return tuple(found)

    def _latent(self, prefix: str, index: int) -> LatentWeights:
        c, sizes = self.config, self.config.latent
        assert sizes is not None, "only called for latent attention"
        queries = Part(prefix + "attn_q", c.n_heads * (sizes.nope_dim + c.rope_dim))
        q_down, q_norm, q_width = None, None, c.n_embd
        if prefix + "attn_q_a.weight" in self.tensors:
            q_width = self.tensors.file.tensors[prefix + "attn_q_a.weight"].shape[0]
            q_down = self.tensors.linear([Part(prefix + "attn_q_a", q_width)], c.n_embd)
            q_norm = self._norm(prefix + "attn_q_a_norm", q_width)
            queries = Part(prefix + "attn_q_b", queries.rows)
        k_up, v_up = self._latent_heads(prefix, sizes)
        return LatentWeights(
            shape=self._shape(index),
            rope=self.rope,
            sizes=sizes,
            q_down=q_down,
            q_norm=q_norm,
            q=self.tensors.linear([queries], q_width),
            kv_down=self.tensors.linear([Part(prefix + "attn_kv_a_mqa", sizes.rank + c.rope_dim)], c.n_embd),
            kv_norm=self._norm(prefix + "attn_kv_a_norm", sizes.rank),
            k_up=tuple(Linear(matrix) for matrix in k_up),
            v_up=tuple(Linear(matrix) for matrix in v_up),
            output=self.tensors.linear([Part(prefix + "attn_output", c.n_embd)], c.n_heads * sizes.value_dim),
        )

    def _latent_heads(self, prefix: str, sizes: LatentConfig) -> tuple[tuple[Matrix, ...], tuple[Matrix, ...]]:
        """What brings each head's queries to the latent side, and its values back; older files have both in one tensor."""
        heads = self.config.n_heads
        if prefix + "attn_kv_b.weight" in self.tensors and prefix + "attn_k_b.weight" not in self.tensors:
            return self.tensors.split_heads(prefix + "attn_kv_b", heads, (sizes.nope_dim, sizes.value_dim), sizes.rank)
        k_up = self.tensors.matrices([Part(prefix + "attn_k_b", sizes.rank)], heads, sizes.nope_dim)
        return k_up, self.tensors.matrices([Part(prefix + "attn_v_b", sizes.value_dim)], heads, sizes.rank)

    def _mlp(self, prefix: str, suffix: str, width: int, row_gate: Linear | None = None) -> MLPWeights:
        c, arch = self.config, self.config.arch
        up = Part(f"{prefix}ffn_up{suffix}", width)
        gated = self._has_gate(prefix, width) if arch.gated == "maybe" else arch.gated
        parts = [Part(f"{prefix}ffn_gate{suffix}", width), up] if gated else [up]
        if gated and parts[0].name + ".weight" not in self.tensors:  # both in one tensor
            parts = [Part(up.name, 2 * width)]
        return MLPWeights(
            up=self.tensors.linear(parts, c.n_embd),
            gated=gated,
            activation=arch.activation,
            sub_norm=self._norm(prefix + "ffn_sub_norm", width) if arch.sub_norm else None,
            row_gate=row_gate,
            down=self.tensors.linear([Part(f"{prefix}ffn_down{suffix}", c.n_embd)], width, c.residual_factor),
        )

    def _has_gate(self, prefix: str, width: int) -> bool:
        """Whether an MLP has one, as a tensor of its own or in that of the rest."""
        up = self.tensors.file.tensors.get(prefix + "ffn_up.weight")
        return prefix + "ffn_gate.weight" in self.tensors or (up is not None and up.shape[0] == 2 * width)

    def _shared_mlp(self, prefix: str) -> MLPWeights | None:
        """The expert that every token goes through; its width is that of its tensor."""
        kind, up = self.config.arch.shared_expert, self.tensors.file.tensors.get(prefix + "ffn_up_shexp.weight")
        if kind == "none" or up is None:
            return None
        gate = None
        if kind == "gated":
            gate = self.tensors.linear([Part(prefix + "ffn_gate_inp_shexp", 1)], self.config.n_embd)
        return self._mlp(prefix, "_shexp", up.shape[0], gate)

    def _experts(self, prefix: str) -> Experts:
        c = self.config
        assert c.routing is not None, "only called for layers with experts"
        down = self.tensors.file.tensors.get(prefix + "ffn_down_exps.weight")
        width = c.n_ff if down is None else down.shape[-1]
        gate_up = [Part(prefix + "ffn_gate_exps", width), Part(prefix + "ffn_up_exps", width)]
        if prefix + "ffn_gate_up_exps.weight" in self.tensors:
            gate_up = [Part(prefix + "ffn_gate_up_exps", 2 * width)]
        bias = prefix + "exp_probs_b.bias"
        return Experts(
            router=self.tensors.linear([Part(prefix + "ffn_gate_inp", c.n_experts)], c.n_embd),
            routing=c.routing,
            gate_up=self.tensors.matrices(gate_up, c.n_experts, c.n_embd),
            down=self.tensors.matrices([Part(prefix + "ffn_down_exps", c.n_embd)], c.n_experts, width),
            activation=c.arch.activation,
            choice_bias=self.tensors.vector(bias, c.n_experts) if bias in self.tensors else None,
        )

    def _head(self, embedding: Matrix) -> Linear:
        c = self.config
        part = Part("output", c.vocab_size)
        if "output.weight" in self.tensors:
            return self.tensors.linear([part], c.n_embd)
        return Linear(embedding)

    def _positions(self) -> Matrix:
        return self.tensors.matrix([Part("position_embd", self.config.context_length)], self.config.n_embd)

    def _norm(self, name: str, width: int = 0, *, repeat: int = 1) -> Norm:
        c, centred = self.config, self.config.arch.norm == "layer"
        if c.arch.weightless:
            return self.tensors.weightless_norm(name, width or c.n_embd, c.norm_eps, centred=centred)
        return self.tensors.norm(name, width or c.n_embd, c.norm_eps, centred=centred, repeat=repeat)

    def _shape(self, index: int) -> AttentionShape:
        c = self.config
        return AttentionShape(
            heads=c.n_heads,
            kv_heads=c.n_kv_heads,
            head_dim=c.head_dim,
            scale=c.attention_scale,
            window=c.windows[index],
            soft_cap=c.attention_cap,
            slopes=alibi_slopes(c.n_heads, c.alibi) if c.alibi else None,
            causal=not c.arch.encoder,
        )

    def _rope_of_layer(self, index: int) -> Rope | None:
        if not self.config.rotated[index]:
            return None
        return self.window_rope if self.config.windows[index] else self.rope

    def _rope(self, max_model_len: int) -> Rope:
        """The rope of layers without a window, with the factors that the file has for it."""
        pairs = self.config.rope_dim // 2
        factors = None
        if "rope_freqs.weight" in self.tensors:
            factors = self.tensors.numbers("rope_freqs.weight", pairs)
        elif "rope_factors_long.weight" in self.tensors:
            short = self.tensors.numbers("rope_factors_short.weight", pairs)
            long = self.tensors.numbers("rope_factors_long.weight", pairs)
            factors = long if max_model_len > self.config.rope_scaling.original_context else short
        if factors is not None and not np.all(np.isfinite(factors) & (factors > 0)):
            raise UnsupportedError("rope factors hold a number that is not above 0")
        return rope_of(self.config, factors)
