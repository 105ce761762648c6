"""The Backend protocol: what the layers above may ask of the arithmetic below.

The network (`models/transformer.py`) is written once against ``Ops``. A backend *binds* it at load: an eager backend (NumPy)
runs it again each step, a capturing backend (CPU, later CUDA) records it once and replays the record. In both cases the arrays
are opaque to the network. All shapes are row-major; ``rows`` is the number of tokens of the step, laid end to end without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.gguf.quants import QuantFormat, dequantise
from shoal.kernels.samplers import Sampler
from shoal.system.machine_limits import MemoryRoom

PAGE_SIZE = 16  # KV positions in a page
LOGIT_ROWS = 64  # most rows that go through the head at once

Array = Any  # whatever the backend computes with
Matrix = Any  # weights in the backend's own layout
KVCache = Any  # the K and V pages of all layers
IntArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A weight as it lies in the file: ``shape`` (rows, columns) or (columns,), ``data`` its bytes [rows, row_bytes] or [row_bytes].
    ``scale`` multiplies all of it, in formats that have one for the whole tensor (I2_S)."""

    name: str
    format: QuantFormat
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    scale: float = 1.0

    def dequantised(self) -> NDArray[np.float32]:
        """Its numbers, exactly: float32 of ``shape``. Raises UnsupportedError for a format without a decoder."""
        return dequantise(self.format, self.data, self.scale)


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step: what a workspace is sized for."""

    max_rows: int
    max_seqs: int
    max_pages_per_seq: int


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers with the same attention window, so that they need the same positions; a page id means that page in each of them."""

    layers: tuple[int, ...]
    pages: int


@dataclass(frozen=True, slots=True)
class StepInput:
    """One ragged step, as arrays. Sequence s owns rows ``row_start[s]`` to ``row_start[s + 1]``; they are its positions
    ``positions[row]``, consecutive, and its KV holds positions 0 ... ``kv_len[s]`` - 1 once the step has stored its own rows.
    In KV group g, position p of sequence s lies in page ``page_table[g, s, p // PAGE_SIZE]`` at offset p % PAGE_SIZE. Pages that no row
    of this or a later step sees through the group's window may hold another sequence by now: they must not be read.
    """

    token_ids: IntArray  # [rows]
    positions: IntArray  # [rows]
    row_start: IntArray  # [seqs + 1]
    kv_len: IntArray  # [seqs]
    page_table: IntArray  # [groups, seqs, max_pages_per_seq]; in a row numbers lie side by side


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding. Pair i of a head turns by position * ``inv_freq[i]``; cos and sin are multiplied by ``scale``.

    ``neox``: pair i is dims (i, i + n) with n = len(inv_freq); otherwise dims (2i, 2i + 1). Dims past 2n pass through.
    """

    inv_freq: NDArray[np.float32]
    neox: bool
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Heads of one layer: query heads, KV heads (query head h reads KV head h // (heads // kv_heads)), size, score scale.

    A score becomes q.k * ``scale``, then ``soft_cap`` * tanh(score / soft_cap) unless that is 0, then, with ``slopes`` (one for
    each query head; ALiBi, Press et al. 2022), minus slope * distance. ``window`` w > 0: a query sees the last w positions,
    its own among them. Not ``causal`` (encoders): every row sees all of its sequence, whose rows are all in the step, and slopes
    count the distance either way.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    soft_cap: float = 0.0
    slopes: tuple[float, ...] | None = None
    causal: bool = True


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm (Zhang and Sennrich 2019), x / sqrt(mean(x^2) + eps) * weight + bias, or with ``centred`` LayerNorm (Ba et al. 2016),
    (x - mean(x)) / sqrt(var(x) + eps) * weight + bias."""

    weight: Array
    eps: float
    centred: bool = False
    bias: Array | None = None


@dataclass(frozen=True, slots=True)
class Linear:
    """x @ matrix.T * scale + bias: ``scale`` and ``bias`` hold one number for each output column."""

    matrix: Matrix
    bias: Array | None = None
    scale: Array | None = None


@dataclass(frozen=True, slots=True)
class Heads:
    """``count`` heads of ``width`` columns, side by side from column ``first`` on."""

    first: int
    count: int
    width: int


Activation = Literal["silu", "gelu", "relu2"]
"""silu x / (1 + exp(-x)); gelu in its tanh form (Hendrycks and Gimpel 2016); relu2 max(x, 0)^2."""


@dataclass(frozen=True, slots=True)
class Routing:
    """How a token chooses ``used`` of its experts (Shazeer et al. 2017). The router's logits become probabilities, by softmax over
    all experts or by sigmoid; the best are chosen, the lowest id first among equals; their probabilities are their weights.

    ``renormalise``: the chosen weights are divided by their sum. They are multiplied by ``scale``. With ``groups`` > 1 only
    experts of the best ``groups_used`` groups can be chosen, a group's score being the sum of its two best (DeepSeek-V3).
    """

    used: int
    gating: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    groups: int = 1
    groups_used: int = 1


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of gated MLPs: ``gate_up`` [2 n_ff, n_embd] and ``down`` [n_embd, n_ff] of each expert. ``choice_bias`` (float32
    [experts]) is added to the probabilities for choosing alone."""

    router: Linear
    routing: Routing
    gate_up: tuple[Matrix, ...]
    down: tuple[Matrix, ...]
    activation: Activation
    choice_bias: Array | None = None


@dataclass(frozen=True, slots=True)
class SampleRows:
    """How to choose a token for each of R rows of logits (one array element per row).

    ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off. Row r draws its one random number from
    (``seed[r]``, ``sample[r]``, ``position[r]``), so it is the same in any batch. ``banned[r]`` ids get no probability.

    What follows is for rows that need more, None as a whole where no row does. ``mask[r]``: uint32 [ceil(vocab / 32)], only tokens
    t whose bit t % 32 of word t // 32 is set get any probability. ``samplers[r]`` change the logits, in their order, after mask
    and banned ids and before the rest of the above. ``sample`` writes to ``surprise[r]`` by how many bits the token of a row
    with Mirostat surprised, among what that left.
    """

    temperature: NDArray[np.float32]
    top_k: IntArray
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    seed: NDArray[np.uint64]
    sample: NDArray[np.uint32]
    position: NDArray[np.uint32]
    banned: Sequence[IntArray | None]
    mask: Sequence[NDArray[np.uint32] | None] | None = None
    samplers: Sequence[tuple[Sampler, ...] | None] | None = None
    surprise: NDArray[np.float32] | None = None


class Ops(Protocol):
    """What the network is made of. Activations are float32 [rows, width] in an opaque array."""

    def embed(self, table: Matrix) -> Array:
        """The step's tokens as rows of ``table``: [rows, n_embd]."""
        ...

    def positions(self, table: Matrix) -> Array:
        """The step's positions as rows of ``table``: [rows, n_embd]."""
        ...

    def received(self, width: int) -> Array:
        """Rows that were computed elsewhere: what ``BoundLayers.receive`` was given before the step, [rows, width]."""
        ...

    def norm(self, x: Array, norm: Norm) -> Array:
        """Every row of x normalised, as an activation for ``linear``."""
        ...

    def norm_heads(self, x: Array, heads: Heads, norm: Norm) -> None:
        """Normalise each of some heads of every row by itself, in place; ``norm.weight`` and ``norm.bias`` hold all heads' in turn."""
        ...

    def linear(self, x: Array, linear: Linear) -> Array:
        """[rows, matrix rows]."""
        ...

    def linear_add(self, residual: Array, x: Array, linear: Linear) -> None:
        """residual += linear(x), in place."""
        ...

    def add(self, residual: Array, x: Array) -> None:
        """residual += x, in place."""
        ...

    def add_vector(self, x: Array, vector: Array) -> None:
        """Every row of x += vector, in place."""
        ...

    def multiply(self, x: Array, factor: float) -> None:
        """x *= factor, in place."""
        ...

    def soft_cap(self, x: Array, cap: float) -> None:
        """x = cap * tanh(x / cap), in place."""
        ...

    def clamp(self, x: Array, limit: float) -> None:
        """Every value brought into +-limit, in place."""
        ...

    def rope_store(self, qkv: Array, layer: int, shape: AttentionShape, rope: Rope | None) -> Array:
        """Turn the q and k heads of ``qkv`` ([rows, (heads + 2 kv_heads) * head_dim]) by position, if there is a ``rope``; store k and
        v in ``layer``'s pages; return q [rows, heads * head_dim]."""
        ...

    def attention(self, q: Array, layer: int, shape: AttentionShape) -> Array:
        """Attention of each row over its own sequence's pages of ``layer``: [rows, heads * head_dim]."""
        ...

    def gated(self, gate_up: Array, activation: Activation) -> Array:
        """activation(gate) * up of [rows, 2 n_ff] (all of gate first; Shazeer 2020): [rows, n_ff]."""
        ...

    def activate(self, x: Array, activation: Activation) -> Array:
        """activation(x)."""
        ...

    def gate_rows(self, x: Array, h: Array, gate: Linear) -> None:
        """x *= sigmoid(linear(h)), in place; ``gate`` has one row."""
        ...

    def experts(self, residual: Array, x: Array, experts: Experts) -> None:
        """residual += sum of weight * expert(x) over each row's chosen experts, in the order of choice, best first."""
        ...

    def columns(self, x: Array, first: int, width: int) -> Array:
        """Columns ``first`` to ``first + width`` of x, not copied."""
        ...

    def concat(self, parts: Sequence[Array]) -> Array:
        """Rows of several arrays side by side, as an array of its own."""
        ...

    def logit_rows(self, x: Array) -> Array:
        """The rows of ``x`` whose logits are wanted."""
        ...


Layers = Callable[[Ops], Array]  # embed and all layers -> hidden state
Head = Callable[[Ops, Array], Array]  # hidden state -> logits, or whatever else is read from it


class BoundLayers(Protocol):
    """Layers bound to their weights, their KV cache and a workspace of fixed size."""

    def receive(self, rows: NDArray[np.float32]) -> None:
        """What ``Ops.received`` is in the next step; it is copied. [rows of that step, width]."""
        ...

    def layers(self, step: StepInput) -> None:
        """Run every layer over the step's rows; KV is stored, the hidden state stays in the workspace."""
        ...

    @property
    def hidden(self) -> NDArray[np.float32]:
        """The hidden state that the last step left, [rows, width]; valid until the next."""
        ...


class BoundNetwork(BoundLayers, Protocol):
    """The same with what is read from the hidden state."""

    def logits(self, rows: IntArray) -> NDArray[np.float32]:
        """Logits [len(rows), vocab] of some rows (at most LOGIT_ROWS) of the last step; valid until the next call."""
        ...

    def sample(self, rows: IntArray, how: SampleRows) -> IntArray:
        """Logits of some rows as above, then one token for each: [len(rows)], -1 where a row's logits hold NaN or no candidate.
        The logits stay readable in ``last_logits``."""
        ...

    def states(self, rows: IntArray) -> NDArray[np.float32]:
        """What the ``states`` of ``bind`` makes of some rows, as ``logits``: [len(rows), n_embd]."""
        ...

    @property
    def last_logits(self) -> NDArray[np.float32]:
        """The logits of the last ``logits`` or ``sample`` call."""
        ...


class Backend(Protocol):
    """One way to do the arithmetic. Chosen once, at load."""

    name: str

    def describe(self) -> str:
        """One line for people: instruction set, threads, how work is shared."""
        ...

    def supports(self, format: QuantFormat) -> bool:
        """Whether matrices of this format can be packed."""
        ...

    def matrix(self, parts: Sequence[RawTensor]) -> Matrix:
        """Pack matrices that read the same input, one below the other."""
        ...

    def vector(self, tensor: RawTensor) -> Array:
        """A small tensor (norm weight, bias) as float32."""
        ...

    def kv_token_bytes(self, kv_heads: int, head_dim: int, dtype: str) -> int:
        """What the K and V of one position take in one layer of a ``kv_cache``, padding and scales included."""
        ...

    def kv_cache(self, groups: Sequence[KVGroup], shape: AttentionShape, dtype: str) -> KVCache:
        """Pages for the layers of each group; ``dtype`` f16, f32 or q8_0 (int8 with a float16 scale for 32 dims of a head). Memory is
        touched only when a page is first written."""
        ...

    def copy_pages(self, cache: KVCache, group: int, pairs: Sequence[tuple[int, int]]) -> None:
        """In all layers of a KV group, copy for each pair the first page onto the second. No page is both first and second."""
        ...

    def bind(
        self, layers: Layers, head: Head, cache: KVCache, limits: StepLimits, states: Head | None = None
    ) -> BoundNetwork:
        """Fix the network, its cache and the size of its workspace. ``states`` is what embeddings are made of, if they are wanted."""
        ...

    def bind_layers(self, layers: Layers, cache: KVCache, limits: StepLimits) -> BoundLayers:
        """As ``bind``, where another backend goes on with the hidden state."""
        ...

    def owners(self, tensor: str) -> tuple[Backend, ...]:
        """In whose memory a tensor of the file lies, by its name: in its own. A backend that is made of others names one of them, or
        more where several compute with it. KV pages lie where the tensors of their layer ("blk.7.") do."""
        ...

    def memory_room(self) -> MemoryRoom | None:
        """What is left for weights and KV pages in memory of its own, which pages take as soon as they are made, what steps need beside
        them taken off. None if it computes in the machine's memory."""
        ...

    def close(self) -> None:
        """Stop threads and let go of memory."""
        ...
