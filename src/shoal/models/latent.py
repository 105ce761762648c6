"""Latent attention (DeepSeek-V2, section 2.1): K and V of all heads are made from one short vector, and only that is stored.

In the absorbed form each query is brought to the latent vector's side by its head's ``k_up``, so that all heads attend to one shared
key, [rotated part | latent vector], whose latent part is the value too; ``v_up`` then makes each head's output from what it got.
"""

from __future__ import annotations

from shoal.kernels.base import Array, Ops
from shoal.models.weights import LatentWeights


def latent_attention(ops: Ops, weights: LatentWeights, index: int, h: Array) -> Array:
    """Attention over h [rows, n_embd]: [rows, heads * value_dim]."""
    sizes, shape = weights.sizes, weights.shape
    kv = ops.linear(h, weights.kv_down)  # latent vector, then the key's rotated part
    latent = ops.norm(ops.columns(kv, 0, sizes.rank), weights.kv_norm)
    rotated = ops.columns(kv, sizes.rank, shape.head_dim - sizes.rank)
    # A value is as wide as a key; what stands behind its latent part is never used.
    qkv = ops.concat([*_queries(ops, weights, h), rotated, latent, latent, rotated])
    a = ops.attention(ops.rope_store(qkv, index, shape, weights.rope), index, shape)
    heads = [ops.columns(a, i * shape.head_dim, sizes.rank) for i in range(shape.heads)]
    return ops.concat([ops.linear(head, v_up) for head, v_up in zip(heads, weights.v_up, strict=True)])


def _queries(ops: Ops, weights: LatentWeights, h: Array) -> list[Array]:
    """For each head its rotated part, then the rest on the latent vector's side."""
    sizes, rope_dim = weights.sizes, weights.shape.head_dim - weights.sizes.rank
    if weights.q_down is not None and weights.q_norm is not None:
        h = ops.norm(ops.linear(h, weights.q_down), weights.q_norm)
    q, width, parts = ops.linear(h, weights.q), sizes.nope_dim + rope_dim, []
    for i, k_up in enumerate(weights.k_up):
        parts.append(ops.columns(q, i * width + sizes.nope_dim, rope_dim))
        parts.append(ops.linear(ops.columns(q, i * width, sizes.nope_dim), k_up))
    return parts
