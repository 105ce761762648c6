"""What the two halves of the sampling kernel share: its arguments, a row of logits in blocks, and random numbers.

A row is read in place. One with a mask, banned ids or samplers is copied first, and the copy is what they change.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numpy import float32, int32

from shoal.kernels.cpu.jit import inline, shared
from shoal.kernels.cpu.simd import (
    Address,
    Scalar,
    equal_lanes,
    first_lanes,
    keep_bits,
    largest_magnitude,
    load_f32x16,
    load_i32,
    load_i64,
    load_u16,
    load_u32,
    lowest_bit,
    magnitude,
    max_lanes,
    maximum,
    maximum_i32,
    splat,
    store_f32,
    store_f32x16,
)

# Arguments, int64 each.
(
    ROWS,  # address of the number of rows
    CHUNKS,  # chunk c takes rows c, c + CHUNKS, ...
    LOGITS,  # float32 [rows, vocab]
    LOGIT_STRIDE,
    VOCAB,
    TEMPERATURE,  # float32 [rows]
    TOP_K,  # int32 [rows]
    TOP_P,  # float32 [rows]
    MIN_P,  # float32 [rows]
    SEED,  # uint64 [rows]
    SAMPLE,  # uint32 [rows]
    POSITION,  # uint32 [rows]
    BANNED_START,  # int32 [rows + 1]: where a row's ids begin in BANNED
    BANNED,  # address of the address of int32 ids
    MASK,  # int64 [rows]: address of a row's bits, or 0
    SAMPLERS_START,  # int32 [rows + 1]: where a row's samplers begin in SAMPLERS
    SAMPLERS,  # address of the address of records (see sample_steps.py)
    ADJUST,  # address of the kernel that applies a row's samplers; 0 while nobody has any
    MEASURE,  # address of the kernel that looks at its token afterwards
    SURPRISE,  # float32 [rows]: an answer
    TOKENS,  # int32 [rows]: the answer
    SCRATCH,  # [chunks, SCRATCH_STRIDE]
    SCRATCH_STRIDE,
) = (8 * i for i in range(23))

BLOCK = 256  # logits
BLOCK_BYTES = 4 * BLOCK
ONE = float32(1)  # the weight of the best
ONE_BITS = int(ONE.view(int32))
LEAST = float32(1e-38)
INFINITY = float32(float("inf"))
MINUS_INFINITY = float32(-float("inf"))
DRAW, COIN = 0, 1  # the third counter words of a row's random numbers


class Row(NamedTuple):
    """One row of logits as blocks of 256, and this chunk's scratch memory for it (addresses)."""

    logits: int
    blocks: int
    copied_from: int  # blocks from this one on are read from ``copy``
    copy: int
    maxima: int  # float32 [blocks, 16]: the maxima of the 16 lanes over a block
    weights: int  # float32 of the candidates, in id order
    ids: int  # int32 of the candidates
    rest: int  # float32: masses of the blocks; or the weights that a search has not ruled out


def _array_bytes(vocab: int) -> int:
    """Room for one number a logit, in whole blocks, and one block more: vectors are written past the end."""
    return BLOCK_BYTES * ((vocab + BLOCK - 1) // BLOCK + 1)


array_bytes = inline(_array_bytes)


def scratch_bytes(vocab: int) -> int:
    """Memory a chunk needs: copy, maxima, weights, ids and rest. What a row does not need is never touched."""
    return 5 * _array_bytes(vocab)


@shared
def philox(seed: int, sample: int, position: int, stream: int) -> Any:
    """A number in [0, 1) from these alone: Philox4x32-10 (Salmon et al. 2011)."""
    mask = 0xFFFFFFFF
    k0, k1 = seed & mask, (seed >> 32) & mask
    c0, c1, c2, c3 = position & mask, sample & mask, stream, 0
    for _ in range(10):
        high, low = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = ((low >> 32) & mask) ^ c1 ^ k0, low & mask, ((high >> 32) & mask) ^ c3 ^ k1, high & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return ((c0 << 21) | (c1 >> 11)) * 2.0**-53


@inline
def row_draw(args: Address, index: int, stream: int) -> Any:
    """A random number of a row."""
    return philox(
        load_i64(load_i64(args + SEED) + 8 * index),
        load_u32(load_i64(args + SAMPLE) + 4 * index),
        load_u32(load_i64(args + POSITION) + 4 * index),
        stream,
    )


@inline
def row_at(args: Address, index: int) -> Any:
    """The row and its scratch memory. Of a row that nothing changes only a last block that is not whole is copied."""
    vocab, array = load_i64(args + VOCAB), array_bytes(load_i64(args + VOCAB))
    memory = load_i64(args + SCRATCH) + index % load_i64(args + CHUNKS) * load_i64(args + SCRATCH_STRIDE)
    banned, changed = load_i64(args + BANNED_START) + 4 * index, has_samplers(args, index)
    if load_i32(banned) != load_i32(banned + 4) or load_i64(load_i64(args + MASK) + 8 * index) != 0:
        changed = True
    return Row(
        load_i64(args + LOGITS) + index * load_i64(args + LOGIT_STRIDE),
        (vocab + BLOCK - 1) // BLOCK,
        0 if changed else vocab // BLOCK,
        memory,
        memory + array,
        memory + 2 * array,
        memory + 3 * array,
        memory + 4 * array,
    )


@inline
def has_samplers(args: Address, index: int) -> Any:
    """Whether a row has any."""
    starts = load_i64(args + SAMPLERS_START) + 4 * index
    return load_i32(starts) != load_i32(starts + 4)


@inline
def copy_row(row: Row, vocab: int) -> None:
    """The blocks that are not read in place, the last filled up with -infinity."""
    for i in range(BLOCK * row.copied_from, BLOCK * row.blocks, 16):
        x = splat(MINUS_INFINITY)
        if i < vocab:
            x = first_lanes(load_f32x16(row.logits + 4 * i), vocab - i, MINUS_INFINITY)
        store_f32x16(row.copy + 4 * i, x)


@inline
def mask_row(args: Address, index: int, row: Row, vocab: int) -> None:
    """-infinity where a row's mask has no bit."""
    bits = load_i64(load_i64(args + MASK) + 8 * index)
    if bits != 0:
        for i in range(0, vocab, 16):
            x = keep_bits(load_f32x16(row.copy + 4 * i), load_u16(bits + i // 8), MINUS_INFINITY)
            store_f32x16(row.copy + 4 * i, x)


@inline
def ban(args: Address, index: int, row: Row, vocab: int) -> None:
    """-infinity for the banned ids."""
    starts, ids = load_i64(args + BANNED_START) + 4 * index, load_i64(load_i64(args + BANNED))
    for i in range(load_i32(starts), load_i32(starts + 4)):
        token = load_i32(ids + 4 * i)
        if 0 <= token < vocab:
            store_f32(row.copy + 4 * token, MINUS_INFINITY)


@inline
def block_at(row: Row, block: int) -> Any:
    """Where a block's logits lie."""
    return (row.logits if block < row.copied_from else row.copy) + BLOCK_BYTES * block


@shared
def best_of(row: Row) -> Any:
    """The largest logit, NaN if any is; writes the maxima."""
    best, size = splat(MINUS_INFINITY), magnitude(splat(0.0))
    for block in range(row.blocks):
        logits, top = block_at(row, block), splat(MINUS_INFINITY)
        for i in range(0, BLOCK_BYTES, 64):
            x = load_f32x16(logits + i)
            top, size = maximum(x, top), maximum_i32(magnitude(x), size)
        store_f32x16(row.maxima + 64 * block, top)
        best = maximum(top, best)
    fill_up(row.maxima, 16 * row.blocks, MINUS_INFINITY)
    largest = largest_magnitude(size)
    return largest if largest != largest else max_lanes(best)


@shared
def first_of(row: Row, best: Scalar) -> Any:
    """The lowest id whose logit is ``best``; after `best_of`."""
    block, i = 0, 0
    while equal_lanes(load_f32x16(row.maxima + 64 * block), best) == 0:
        block += 1
    logits = block_at(row, block)
    while equal_lanes(load_f32x16(logits + 4 * i), best) == 0:
        i += 16
    return BLOCK * block + i + lowest_bit(equal_lanes(load_f32x16(logits + 4 * i), best))


@inline
def fill_up(values: Address, size: int, value: Scalar) -> Any:
    """Write ``value`` behind so many values until they are whole blocks; how many blocks."""
    blocks = (size + BLOCK - 1) // BLOCK
    for i in range(size, BLOCK * blocks, 16):
        store_f32x16(values + 4 * i, splat(value))
    return blocks
