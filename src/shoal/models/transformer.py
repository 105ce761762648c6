"""The network, once, top to bottom. No arithmetic of its own: arrays are opaque and every line is a call to the backend."""

from __future__ import annotations

from shoal.kernels.base import Array, Ops
from shoal.models.weights import LayerWeights, Model


def run_layers(ops: Ops, model: Model) -> Array:
    """Embed the step's tokens and pass them through every layer: the hidden state [rows, n_embd]."""
    x = ops.embed(model.embedding)
    for index, layer in enumerate(model.layers):
        _attention(ops, model, index, layer, x)
        _feed_forward(ops, model, layer, x)
    return x


def run_head(ops: Ops, model: Model, x: Array) -> Array:
    """Logits of the rows that are wanted: [logit rows, vocab]."""
    h = ops.norm(ops.logit_rows(x), model.output_norm, model.config.norm_eps)
    return ops.linear(h, model.head)


def _attention(ops: Ops, model: Model, index: int, layer: LayerWeights, x: Array) -> None:
    h = ops.norm(x, layer.attn_norm, model.config.norm_eps)
    qkv = ops.linear(h, layer.qkv, layer.qkv_bias)
    q = ops.rope_store(qkv, index, model.shape, model.rope)
    a = ops.attention(q, index, model.shape)
    ops.linear_add(x, a, layer.attn_output, layer.attn_output_bias)


def _feed_forward(ops: Ops, model: Model, layer: LayerWeights, x: Array) -> None:
    h = ops.norm(x, layer.ffn_norm, model.config.norm_eps)
    gate_up = ops.linear(h, layer.gate_up, layer.gate_up_bias)
    ops.linear_add(x, ops.swiglu(gate_up), layer.ffn_down, layer.ffn_down_bias)
