"""Encoders (BERT and its kin): every token sees all of its text, which is computed in one step; a state for each token comes out.

Norms follow the sums: x = norm(x + attention(x)), then x = norm(x + mlp(x)). K and V are needed no longer than their layer's
attention, so that all layers use the pages of the first.
"""

from __future__ import annotations

from shoal.kernels.base import Array, Ops
from shoal.models.transformer import attention_heads, mlp_inner
from shoal.models.weights import Encoder, EncoderLayer


def run_encoder(ops: Ops, model: Encoder) -> Array:
    """The step's tokens through all layers, but for the last norm: [rows, n_embd]."""
    x = ops.embed(model.embedding)
    if model.type_row is not None:
        ops.add_vector(x, model.type_row)
    if model.positions is not None:
        ops.add(x, ops.positions(model.positions))
    x = ops.norm(x, model.embedding_norm)
    for layer in model.layers:
        x = _layer(ops, layer, x)
    return x


def run_encoder_states(ops: Ops, model: Encoder, x: Array) -> Array:
    """The states of the rows that are wanted: [logit rows, n_embd]."""
    return ops.norm(ops.logit_rows(x), model.output_norm)


def run_classifier(ops: Ops, model: Encoder, x: Array) -> Array:
    """Scores of the rows that are wanted: [logit rows, classes], of which the first is relevance."""
    state = run_encoder_states(ops, model, x)
    inner, outer = model.classifier
    if inner is not None:
        state = ops.linear(state, inner)
        ops.soft_cap(state, 1.0)  # tanh
    return state if outer is None else ops.linear(state, outer)


def _layer(ops: Ops, layer: EncoderLayer, x: Array) -> Array:
    attended = ops.linear(attention_heads(ops, layer.attention, 0, x), layer.attention.output)
    ops.add(attended, x)
    h = ops.norm(attended, layer.attention_norm)
    if layer.second_norm is not None:
        ops.add(h, x)
        h = ops.norm(h, layer.second_norm)
    inner = mlp_inner(ops, layer.mlp, h)
    ops.linear_add(h, inner, layer.mlp.down)
    return h if layer.mlp_norm is None else ops.norm(h, layer.mlp_norm)
