"""The pool: every chunk of every operation once, one operation after another."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from shoal.kernels.cpu.jit import kernel
from shoal.kernels.cpu.pool import Pool, program
from shoal.kernels.cpu.simd import Address, atomic_add, atomic_load, load_i64, pause, store_i64


@kernel
def count_chunk(args: Address, chunk: int) -> None:
    """Count a chunk in a table of its own."""
    atomic_add(args + 8 * chunk, 1)


@kernel
def sum_before(args: Address, chunk: int) -> None:
    """Write how much the operation before has counted: args = (table, entries, answer)."""
    total = 0
    for i in range(load_i64(args + 8)):
        total += load_i64(load_i64(args) + 8 * i)
    store_i64(load_i64(args + 16), total)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_chunk_runs_once_and_in_order(threads: int) -> None:
    pool = Pool(threads, spins=200)
    counts = np.zeros((50, 37), np.int64)
    sums = np.zeros(50, np.int64)
    chunks, one = np.array([37], np.int64), np.array([1], np.int64)
    args = [np.array([counts[i].ctypes.data, 37, sums[i:].ctypes.data], np.int64) for i in range(50)]
    ops = []
    for i in range(50):
        ops.append((count_chunk.address, counts[i].ctypes.data, chunks.ctypes.data))
        ops.append((sum_before.address, args[i].ctypes.data, one.ctypes.data))
    both = program(ops)
    for turn in range(1, 21):
        pool.run(both)
        assert (counts == turn).all()
        assert (sums == 37 * turn).all()
        if turn % 5 == 0:
            time.sleep(0.01)  # long enough for workers to park
    pool.close()


@kernel
def be_slow(args: Address, chunk: int) -> None:
    """Wait for as many looks as the argument says."""
    for _ in range(load_i64(args)):
        pause()


@kernel
def meet(args: Address, chunk: int) -> None:
    """Count who is here and wait for a second one, but not for ever: args = (arrived, met)."""
    atomic_add(args, 1)
    looks = 0
    while atomic_load(args) < 2 and looks < 100_000_000:
        pause()
        looks += 1
    if atomic_load(args) == 2 and looks < 100_000_000:
        atomic_add(args + 8, 1)


def test_a_worker_stays_for_a_whole_program() -> None:
    """Even if one chunk takes the other thread much longer than a worker waits between programs."""
    pool = Pool(2, spins=200)
    looks, one, two, seen = np.array([1_000_000]), np.array([1]), np.array([2]), np.zeros(2, np.int64)
    slow = (be_slow.address, looks.ctypes.data, one.ctypes.data)
    pool.run(program([slow, (meet.address, seen.ctypes.data, two.ctypes.data)]))
    assert seen.tolist() == [2, 2]
    pool.close()


def test_an_operation_without_chunks_is_passed_over() -> None:
    pool = Pool(2)
    counts, zero, two = np.zeros(2, np.int64), np.zeros(1, np.int64), np.array([2], np.int64)
    skip = (count_chunk.address, counts.ctypes.data, zero.ctypes.data)
    pool.run(program([skip, (count_chunk.address, counts.ctypes.data, two.ctypes.data), skip]))
    assert counts.tolist() == [1, 1]
    pool.run(program([skip, skip]))
    assert counts.tolist() == [1, 1]
    pool.close()


def test_callers_from_several_threads_take_turns() -> None:
    pool = Pool(2)
    counts, chunks = np.zeros(8, np.int64), np.array([8], np.int64)
    work = program([(count_chunk.address, counts.ctypes.data, chunks.ctypes.data)] * 10)

    def call() -> None:
        for _ in range(50):
            pool.run(work)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert counts.tolist() == [2000] * 8
    pool.close()


def test_closing_ends_the_workers() -> None:
    before = set(threading.enumerate())
    pool = Pool(4)
    workers = set(threading.enumerate()) - before
    assert len(workers) == 3
    pool.close()
    for worker in workers:
        worker.join()  # for ever, otherwise
