"""The network, once, top to bottom. No arithmetic of its own: arrays are opaque and every line is a call to the backend."""

from __future__ import annotations

from shoal.kernels.base import Array, Linear, Norm, Ops
from shoal.models.latent import latent_attention
from shoal.models.weights import AttentionWeights, LatentWeights, LayerWeights, MLPWeights, Model


def run_layers(ops: Ops, model: Model) -> Array:
    """Embed the step's tokens and pass them through every layer: the hidden state [rows, n_embd]."""
    x = _embed(ops, model)
    for index, layer in enumerate(model.layers):
        h = _normed(ops, x, layer.attention_norm)
        if model.config.parallel:
            m = h if layer.mlp_norm is None else ops.norm(x, layer.mlp_norm)
            _attention(ops, layer, index, x, h)
        else:
            _attention(ops, layer, index, x, h)
            m = _normed(ops, x, layer.mlp_norm)
        _feed_forward(ops, layer, x, m)
    return x


def run_states(ops: Ops, model: Model, x: Array) -> Array:
    """What embeddings are made of, for the rows that are wanted: the hidden state after the last norm, as in llama.cpp."""
    return ops.norm(ops.logit_rows(x), model.output_norm)


def run_head(ops: Ops, model: Model, x: Array) -> Array:
    """Logits of the rows that are wanted: [logit rows, vocab]."""
    config = model.config
    logits = ops.linear(run_states(ops, model, x), model.head)
    if config.logit_factor != 1.0:
        ops.multiply(logits, config.logit_factor)
    if config.final_cap:
        ops.soft_cap(logits, config.final_cap)
    return logits


def _embed(ops: Ops, model: Model) -> Array:
    x = ops.embed(model.embedding)
    if model.config.embedding_factor != 1.0:
        ops.multiply(x, model.config.embedding_factor)
    if model.positions is not None:
        ops.add(x, ops.positions(model.positions))
    return _normed(ops, x, model.embedding_norm)


def _attention(ops: Ops, layer: LayerWeights, index: int, x: Array, h: Array) -> None:
    """Attention over h joins x."""
    weights = layer.attention
    if isinstance(weights, LatentWeights):
        a = latent_attention(ops, weights, index, h)
    else:
        a = attention_heads(ops, weights, index, h)
    _join(ops, x, a, weights.output, layer.attention_post_norm)


def attention_heads(ops: Ops, weights: AttentionWeights, index: int, h: Array) -> Array:
    """Attention over h, before its last matrix; K and V go to the pages of layer ``index``."""
    qkv = ops.linear(h, weights.qkv)
    if weights.clamp:
        ops.clamp(qkv, weights.clamp)
    for part in weights.head_norms:
        ops.norm_heads(qkv, part.heads, part.norm)
    q = ops.rope_store(qkv, index, weights.shape, weights.rope)
    return _normed(ops, ops.attention(q, index, weights.shape), weights.sub_norm)


def _feed_forward(ops: Ops, layer: LayerWeights, x: Array, h: Array) -> None:
    """The experts and the MLP over h join x."""
    if layer.experts is not None:
        ops.experts(x, h, layer.experts)
    if layer.mlp is not None:
        _join(ops, x, mlp_inner(ops, layer.mlp, h), layer.mlp.down, layer.mlp_post_norm)


def mlp_inner(ops: Ops, weights: MLPWeights, h: Array) -> Array:
    """What goes into the last matrix."""
    up = ops.linear(h, weights.up)
    a = ops.gated(up, weights.activation) if weights.gated else ops.activate(up, weights.activation)
    if weights.row_gate is not None:
        ops.gate_rows(a, h, weights.row_gate)
    return _normed(ops, a, weights.sub_norm)


def _join(ops: Ops, x: Array, branch: Array, last: Linear, post_norm: Norm | None) -> None:
    """x += last(branch), normalised where there is a norm for it."""
    if post_norm is None:
        ops.linear_add(x, branch, last)
    else:
        ops.add(x, ops.norm(ops.linear(branch, last), post_norm))


def _normed(ops: Ops, x: Array, norm: Norm | None) -> Array:
    return x if norm is None else ops.norm(x, norm)
