"""Mixtures of experts: each row chooses some experts, and each chosen expert's weights are read once for all rows that chose it.

A *slot* is one choice of one row. Slots are ordered by expert, and by row within an expert, so that an expert's inputs and outputs
are rows that lie together: its matrices are multiplied by the kernels of any other matrix (linear.py). A step goes through

    choose    each row: probabilities of all experts, the best ones, their weights
    arrange   the slots of all choices (a counting sort), and which experts have any
    gather    the inputs of all slots
    products  gate and up of all experts that have slots; then, after the activation, down
    combine   each row's slots, weighted, in the order of choice

Only the order of slots depends on who else is in the step, and no number depends on that order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import float32
from numpy.typing import NDArray

from shoal.kernels.base import Experts
from shoal.kernels.cpu import strips
from shoal.kernels.cpu.elementwise import span
from shoal.kernels.cpu.groups import TENSOR_SCALE
from shoal.kernels.cpu.jit import inline, kernel
from shoal.kernels.cpu.pack import PackedMatrix
from shoal.kernels.cpu.pool import CHUNKS_PER_THREAD
from shoal.kernels.cpu.recording import Recording, Rows
from shoal.kernels.cpu.simd import (
    Address,
    Scalar,
    add,
    call_kernel,
    div,
    exp,
    first_lanes,
    fma,
    load_f32,
    load_f32x16,
    load_i32,
    load_i64,
    load_u8x64,
    max_lanes,
    maximum,
    scratch,
    splat,
    store_f32,
    store_f32x16,
    store_i32,
    store_i64,
    store_u8x64,
    sub,
    sum_lanes,
)

# Arguments of choose, arrange and combine, int64 each: one array for a layer. Numbers of choices are [rows, used].
(
    _SPACE,  # address of the row space of the step (elementwise.py)
    EXPERTS,  # how many
    USED,  # how many a row chooses
    LOGITS,  # float32 rows of the router; the probabilities are written over them
    LOGIT_STRIDE,  # bytes
    SCORES,  # float32 rows: what is chosen by, then a number for each group, then int32 numbers of groups
    SCORE_STRIDE,
    BIAS,  # float32 [experts] that is added to the scores, 0: none
    SIGMOID,  # 1: probabilities are sigmoids; 0: softmax
    GROUPS,
    GROUPS_USED,
    RENORMALISE,  # 1: weights are divided by their sum
    SCALE,  # address of a float32 that multiplies the weights
    CHOSEN,  # int32 choices: experts, best first
    WEIGHTS,  # float32 choices
    SLOTS,  # int32 choices: the slot of each
    SOURCES,  # int32 [slots]: the row of each slot
    SLOT_SPACE,  # the row space of all slots
    CHUNKS_WANTED,  # in that space
    COUNTS,  # int64 [experts]: slots of each
    NEXT,  # int64 [experts]: the next free slot of each
    ACTIVE,  # int64 pairs: an expert that has slots, the first of them
    GATE_UP,  # address of (chunks of one expert's matrix, chunks of all active experts')
    DOWN,  # the same
    OUT,  # float32 rows of all slots: what the experts make of them
    OUT_STRIDE,
    RESIDUAL,  # float32 rows that it is added to
    RESIDUAL_STRIDE,
    WIDTH,  # values of a row
) = (8 * i for i in range(29))
_FIELDS = 29

# Arguments of gather: SLOT_SPACE, SOURCES, how many planes, then for each (rows, bytes to the next row, slots, bytes of one slot).
_FROM, _PLANES, _FIRST_PLANE, _PLANE_BYTES = 8, 16, 24, 32

# Arguments of products, then for each part of a matrix (chunks, kernel, its arguments for an expert at slot 0).
(
    _CHUNKS,  # of one expert
    _ACTIVE,
    _COUNTS,
    _TABLE,  # int64 [experts, parts, 2]: addresses of strips and of the tensor's scale
    _TABLE_STRIDE,
    _FIRST_PART,
) = (8 * i for i in range(6))

_CHUNKS_PER_EXPERT = 4  # at least: some experts have most of the rows
_MINUS_INFINITY, _INFINITY = float32(-float("inf")), float32(float("inf"))
_K1 = (0,)

# --- choosing --------------------------------------------------------------------------------------------------------


@inline
def _best(values: Address, count: int, best: Address, used: int) -> None:
    """Numbers of the ``used`` largest of ``count`` values, largest first, the lowest number first among equals. Always numbers of
    ``used`` different values, whatever they are."""
    for i in range(count):
        value = load_f32(values + 4 * i)
        if i >= used and value <= load_f32(values + 4 * load_i32(best + 4 * (used - 1))):
            continue
        place = min(i, used - 1)
        while place > 0 and value > load_f32(values + 4 * load_i32(best + 4 * (place - 1))):
            store_i32(best + 4 * place, load_i32(best + 4 * (place - 1)))
            place -= 1
        store_i32(best + 4 * place, i)


@inline
def _softmax(x: Address, count: int) -> None:
    """In place; what lies behind the last value up to a whole register becomes 0."""
    most = splat(_MINUS_INFINITY)
    for i in range(0, count, 16):
        most = maximum(first_lanes(load_f32x16(x + 4 * i), count - i, _MINUS_INFINITY), most)
    largest, total = splat(max_lanes(most)), splat(0.0)
    for i in range(0, count, 16):
        v = first_lanes(exp(sub(load_f32x16(x + 4 * i), largest)), count - i, float32(0.0))
        store_f32x16(x + 4 * i, v)
        total = add(total, v)
    divisor = splat(sum_lanes(total))
    for i in range(0, count, 16):
        store_f32x16(x + 4 * i, div(load_f32x16(x + 4 * i), divisor))


@inline
def _sigmoid(x: Address, count: int) -> None:
    """In place, up to a whole register."""
    one = splat(1.0)
    for i in range(0, count, 16):
        v = sub(splat(0.0), load_f32x16(x + 4 * i))
        store_f32x16(x + 4 * i, div(one, add(one, exp(v))))


@inline
def _two_best(values: Address, count: int) -> Scalar:
    """Sum of the two largest of some values, or the only one."""
    if count == 1:
        return load_f32(values)
    best, second = _MINUS_INFINITY, _MINUS_INFINITY
    for i in range(count):
        value = load_f32(values + 4 * i)
        if value > best:
            best, second = value, best
        elif value > second:
            second = value
    return best + second


@inline
def _close_groups(scores: Address, experts: int, groups: int, used: int) -> None:
    """Scores outside the best groups become minus infinity."""
    size = experts // groups
    of_groups = scores + 4 * experts
    kept = of_groups + 4 * groups
    for g in range(groups):
        store_f32(of_groups + 4 * g, _two_best(scores + 4 * size * g, size))
    _best(of_groups, groups, kept, used)
    for i in range(used):
        store_f32(of_groups + 4 * load_i32(kept + 4 * i), _INFINITY)  # marked
    for i in range(experts):
        if load_f32(of_groups + 4 * (i // size)) != _INFINITY:
            store_f32(scores + 4 * i, _MINUS_INFINITY)


@inline
def _scores(args: Address, probabilities: Address, scores: Address) -> None:
    """What a row's experts are chosen by."""
    experts, bias = load_i64(args + EXPERTS), load_i64(args + BIAS)
    for i in range(0, 4 * experts, 64):
        p = load_f32x16(probabilities + i)
        store_f32x16(scores + i, p if bias == 0 else add(p, load_f32x16(bias + i)))
    if load_i64(args + GROUPS) > 1:
        _close_groups(scores, experts, load_i64(args + GROUPS), load_i64(args + GROUPS_USED))


@inline
def _weigh(args: Address, probabilities: Address, chosen: Address, weights: Address) -> None:
    """The weights of a row's chosen experts; sums go in the order of choice."""
    used, scale = load_i64(args + USED), load_f32(load_i64(args + SCALE))
    total = float32(0.0)
    for i in range(used):
        total += load_f32(probabilities + 4 * load_i32(chosen + 4 * i))
    divisor = total if load_i64(args + RENORMALISE) != 0 else float32(1.0)
    for i in range(used):
        store_f32(weights + 4 * i, load_f32(probabilities + 4 * load_i32(chosen + 4 * i)) / divisor * scale)


@kernel
def choose(args: Address, chunk: int) -> None:
    """Every row's experts and their weights."""
    experts, used = load_i64(args + EXPERTS), load_i64(args + USED)
    first, last = span(args, chunk)
    for row in range(first, last):
        logits = load_i64(args + LOGITS) + row * load_i64(args + LOGIT_STRIDE)
        scores = load_i64(args + SCORES) + row * load_i64(args + SCORE_STRIDE)
        at = 4 * used * row
        if load_i64(args + SIGMOID) != 0:
            _sigmoid(logits, experts)
        else:
            _softmax(logits, experts)
        _scores(args, logits, scores)
        _best(scores, experts, load_i64(args + CHOSEN) + at, used)
        _weigh(args, logits, load_i64(args + CHOSEN) + at, load_i64(args + WEIGHTS) + at)


# --- slots -----------------------------------------------------------------------------------------------------------


@inline
def _count(args: Address, choices: int) -> None:
    """How many chose each expert."""
    counts, chosen = load_i64(args + COUNTS), load_i64(args + CHOSEN)
    for expert in range(load_i64(args + EXPERTS)):
        store_i64(counts + 8 * expert, 0)
    for i in range(choices):
        count = counts + 8 * load_i32(chosen + 4 * i)
        store_i64(count, load_i64(count) + 1)


@inline
def _list_active(args: Address) -> Any:
    """Lists the experts that have slots; how many."""
    active, slot = 0, 0
    for expert in range(load_i64(args + EXPERTS)):
        count = load_i64(load_i64(args + COUNTS) + 8 * expert)
        if count > 0:
            entry = load_i64(args + ACTIVE) + 16 * active
            store_i64(entry, expert)
            store_i64(entry + 8, slot)
            store_i64(load_i64(args + NEXT) + 8 * expert, slot)
            active, slot = active + 1, slot + count
    return active


@inline
def _give_slots(args: Address, choices: int) -> None:
    slots, sources, chosen = load_i64(args + SLOTS), load_i64(args + SOURCES), load_i64(args + CHOSEN)
    used = load_i64(args + USED)
    for i in range(choices):
        place = load_i64(args + NEXT) + 8 * load_i32(chosen + 4 * i)
        slot = load_i64(place)
        store_i64(place, slot + 1)
        store_i32(slots + 4 * i, slot)
        store_i32(sources + 4 * slot, i // used)


@kernel
def arrange(args: Address, chunk: int) -> None:
    """Slots for all choices, and how many chunks the operations on them have."""
    choices = load_i64(load_i64(args)) * load_i64(args + USED)
    _count(args, choices)
    active = _list_active(args)
    _give_slots(args, choices)
    per_chunk = max(1, choices // load_i64(args + CHUNKS_WANTED))
    space = load_i64(args + SLOT_SPACE)
    store_i64(space, choices)
    store_i64(space + 8, per_chunk)
    store_i64(space + 16, (choices + per_chunk - 1) // per_chunk)
    for field in (GATE_UP, DOWN):
        chunks = load_i64(args + field)
        store_i64(chunks + 8, active * load_i64(chunks))


@inline
def _copy(source: Address, target: Address, size: int) -> None:
    """``size`` bytes, a multiple of 4, and no more: the next slot may be somebody else's."""
    whole = size - size % 64
    for i in range(0, whole, 64):
        store_u8x64(target + i, load_u8x64(source + i))
    for i in range(whole, size, 4):
        store_i32(target + i, load_i32(source + i))


@kernel
def gather(args: Address, chunk: int) -> None:
    """The row of every slot."""
    first, last = span(args, chunk)
    for slot in range(first, last):
        row = load_i32(load_i64(args + _FROM) + 4 * slot)
        for plane in range(load_i64(args + _PLANES)):
            fields = args + _FIRST_PLANE + _PLANE_BYTES * plane
            source, size = load_i64(fields) + row * load_i64(fields + 8), load_i64(fields + 24)
            _copy(source, load_i64(fields + 16) + slot * size, size)


@kernel
def combine(args: Address, chunk: int) -> None:
    """Every row of RESIDUAL plus its slots times their weights, in the order of choice."""
    used, out, stride = load_i64(args + USED), load_i64(args + OUT), load_i64(args + OUT_STRIDE)
    first, last = span(args, chunk)
    for row in range(first, last):
        x = load_i64(args + RESIDUAL) + row * load_i64(args + RESIDUAL_STRIDE)
        slots, weights = load_i64(args + SLOTS) + 4 * used * row, load_i64(args + WEIGHTS) + 4 * used * row
        for i in range(0, 4 * load_i64(args + WIDTH), 64):
            acc = load_f32x16(x + i)
            for place in range(used):
                y = out + load_i32(slots + 4 * place) * stride
                acc = fma(splat(load_f32(weights + 4 * place)), load_f32x16(y + i), acc)
            store_f32x16(x + i, acc)


# --- products --------------------------------------------------------------------------------------------------------


@inline
def _advance(call: Address, field: int, size: int) -> None:
    store_i64(call + field, load_i64(call + field) + size)


@inline
def _begin_at(call: Address, slot: int) -> None:
    """Arguments of a linear kernel for rows from ``slot`` on."""
    scales = load_i64(call + strips.X_STRIDE) // 4
    _advance(call, strips.X, slot * load_i64(call + strips.X_STRIDE))
    _advance(call, strips.SCALES, slot * scales)
    _advance(call, strips.MINUS_SUMS, slot * scales)
    _advance(call, strips.HALF_SUMS, slot * scales)
    _advance(call, strips.SUMS, slot * (scales // 2))
    _advance(call, strips.OUT, slot * load_i64(call + strips.OUT_STRIDE))


@kernel
def products(args: Address, chunk: int) -> None:
    """One chunk of one part of one active expert's matrix, over all its slots."""
    per_expert = load_i64(args + _CHUNKS)
    active, left = load_i64(args + _ACTIVE) + 16 * (chunk // per_expert), chunk % per_expert
    expert = load_i64(active)
    part, weights = args + _FIRST_PART, load_i64(args + _TABLE) + expert * load_i64(args + _TABLE_STRIDE)
    while left >= load_i64(part):
        left -= load_i64(part)
        part, weights = part + 24, weights + 16
    call = scratch(_K1)
    for i in range(0, 8 * strips.LINEAR_FIELDS, 8):
        store_i64(call + i, load_i64(load_i64(part + 16) + i))
    store_i64(call + strips.WEIGHTS, load_i64(weights))
    store_i64(call + TENSOR_SCALE, load_i64(weights + 8))
    store_i64(call + strips.ROWS, load_i64(args + _COUNTS) + 8 * expert)
    _begin_at(call, load_i64(active + 8))
    call_kernel(load_i64(part + 8), call, left)


# --- recording -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Choices:
    """Workspace for the choices of a step, for all layers with as many experts: ``slots`` records operations on slots as rows,
    ``fields`` are addresses by argument."""

    slots: Recording
    fields: dict[int, int]


def record_experts(
    recorder: Recording, known: dict[tuple[int, int], Choices], residual: Rows, x: Rows, experts: Experts
) -> None:
    """Append ``Ops.experts`` to a program. ``x`` is rounded first of all: then the operation that made it can do that."""
    used = experts.routing.used
    choices = _choices(recorder, known, len(experts.gate_up), used)
    args = recorder.fields(_FIELDS)
    inputs, gather_args = _inputs(recorder, choices, x, experts.gate_up[0])
    _record_choice(recorder, args, x, experts)
    _set(args, choices.fields.items())
    recorder.ops.append((arrange, args, recorder.kept(np.ones(1, np.int64))))
    choices.slots.each_row(gather, gather_args)
    gate_up, args[GATE_UP // 8] = _products(choices, inputs, experts.gate_up, used)
    out, args[DOWN // 8] = _products(choices, choices.slots.gated(gate_up, experts.activation), experts.down, used)
    rows = (residual.address, residual.stride, residual.width)
    _set(args, zip((OUT, OUT_STRIDE, RESIDUAL, RESIDUAL_STRIDE, WIDTH), (out.address, out.stride, *rows), strict=True))
    recorder.each_row(combine, args)
    residual.changed()


def _choices(recorder: Recording, known: dict[tuple[int, int], Choices], experts: int, used: int) -> Choices:
    """Made once: what one layer leaves there the next may overwrite."""
    key = experts, used
    if key not in known:
        most = recorder.max_rows * used
        fields = {
            **{field: recorder.kept(np.zeros(most, np.int32)) for field in (CHOSEN, WEIGHTS, SLOTS, SOURCES)},
            **{field: recorder.kept(np.zeros(experts, np.int64)) for field in (COUNTS, NEXT)},
            ACTIVE: recorder.kept(np.zeros((experts, 2), np.int64)),
            SLOT_SPACE: recorder.kept(np.zeros(3, np.int64)),
            CHUNKS_WANTED: recorder.threads * CHUNKS_PER_THREAD,
        }
        known[key] = Choices(recorder.over(fields[SLOT_SPACE], most), fields)
    return known[key]


def _record_choice(recorder: Recording, args: NDArray[np.int64], x: Rows, experts: Experts) -> None:
    """The router, and what is made of its logits."""
    routing = experts.routing
    logits = recorder.linear(x, experts.router)
    scores = recorder.new_rows(logits.width + 2 * routing.groups)
    fields = (
        (_SPACE, recorder.space),
        (EXPERTS, logits.width),
        (USED, routing.used),
        (LOGITS, logits.address),
        (LOGIT_STRIDE, logits.stride),
        (SCORES, scores.address),
        (SCORE_STRIDE, scores.stride),
        (BIAS, 0 if experts.choice_bias is None else recorder.kept(experts.choice_bias)),
        (SIGMOID, int(routing.gating == "sigmoid")),
        (GROUPS, routing.groups),
        (GROUPS_USED, routing.groups_used),
        (RENORMALISE, int(routing.renormalise)),
        (SCALE, recorder.kept(np.array([routing.scale], np.float32))),
    )
    _set(args, fields)
    recorder.each_row(choose, args)


def _inputs(recorder: Recording, choices: Choices, x: Rows, matrix: PackedMatrix) -> tuple[Rows, NDArray[np.int64]]:
    """x by slots, as the parts of ``matrix`` read it: float32, rounded, or both. With the arguments of the gather that fills it."""
    out = choices.slots.new_rows(x.width)
    planes: list[tuple[int, int, int, int]] = []
    if any(part.layout.is_float for part in matrix.parts):
        planes.append((x.address, x.stride, out.address, out.stride))
    if not all(part.layout.is_float for part in matrix.parts):
        out.rounded = choices.slots.rounded_rows(x.width)
        for source, target in zip(recorder.rounded_form(x).buffers, out.rounded.buffers, strict=True):
            planes.append((source.address, source.row_bytes, target.address, target.row_bytes))
    args = recorder.fields((_FIRST_PLANE + _PLANE_BYTES * len(planes)) // 8)
    args[:3] = choices.fields[SLOT_SPACE], choices.fields[SOURCES], len(planes)
    args[3:] = np.array(planes).reshape(-1)
    return out, args


def _products(choices: Choices, x: Rows, matrices: tuple[PackedMatrix, ...], used: int) -> tuple[Rows, int]:
    """One operation for a matrix of every expert: the rows it writes, and the address of (chunks of one expert, chunks of all)."""
    slots, first = choices.slots, matrices[0]
    assert all(_layouts(matrix) == _layouts(first) for matrix in matrices), "the experts of a layer are one stack"
    out, chunk = slots.new_rows(first.rows), _strips_per_chunk(first, slots.threads, used)
    parts = [slots.part(out, x, first.columns, part, chunk, add=False) for part in first.parts]
    table = np.array([[(p.data.ctypes.data, p.scale.ctypes.data) for p in m.parts] for m in matrices], np.int64)
    chunks = np.array([sum(n for _, _, n in parts), 0], np.int64)
    args = slots.fields((_FIRST_PART + 24 * len(parts)) // 8)
    args[:5] = chunks[0], choices.fields[ACTIVE], choices.fields[COUNTS], slots.kept(table), table.strides[0]
    args[5:] = [n for product, a, count in parts for n in (count, product.address, a.ctypes.data)]
    address = slots.kept(chunks)
    slots.ops.append((products, args, address + 8))
    return out, address


def _layouts(matrix: PackedMatrix) -> list[tuple[str, int]]:
    return [(part.layout.name, part.rows) for part in matrix.parts]


def _strips_per_chunk(matrix: PackedMatrix, threads: int, used: int) -> int:
    """As many experts as a row uses have slots, at least."""
    strips = sum(len(part.data) for part in matrix.parts)
    return max(1, strips // max(_CHUNKS_PER_EXPERT, threads * CHUNKS_PER_THREAD // used))


def _set(args: NDArray[np.int64], fields: Iterable[tuple[int, int]]) -> None:
    for field, value in fields:
        args[field // 8] = value
