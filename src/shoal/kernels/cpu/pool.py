"""A program of kernels, run by a few threads: the one place where shoal is parallel on the CPU.

A *program* is a table of operations. Each has a kernel, its arguments and a number of chunks; operation n + 1 starts when every
chunk of operation n is done. Threads take chunks one at a time from a shared ticket, so a thread that the system has put to
sleep holds up no more than the chunk it has in hand; nobody waits for a thread that has nothing.

    ticket    | operation number, counted up for ever (32 bits) | chunks left (32 bits) |
    operation | kernel address | arguments address | address of the number of chunks |

Taking a chunk is a compare-and-swap of the whole ticket: it can only succeed while that operation is open, and while a chunk is
out the operation cannot end, so what the table says about it is stable. Between programs idle threads spin for a moment and then park
in Python; during one they do not, however long the last chunk of an operation takes the others.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.kernels.cpu.jit import function, inline
from shoal.kernels.cpu.simd import (
    Address,
    atomic_add,
    atomic_load,
    atomic_store,
    atomic_swap,
    call_kernel,
    compare_swap,
    load_i64,
    pause,
    sched_yield,
)

OP_BYTES = 24
CHUNKS_PER_THREAD = 4  # of a product: long runs of weights stream faster; short ones share better with a busy neighbour
# Offsets of the shared state, each in a cache line of its own.
TICKET, DONE, PROGRAM, BASE, LENGTH, FINISHED, STOP, RUNNING, PARKED = (64 * i for i in range(9))
_STATE_BYTES = 64 * 9
_SPINS_PER_YIELD = 2000


@inline
def _open(state: Address, number: int) -> None:
    """Open operation ``number`` (or the first after it that has work); the program ends after its last one."""
    base, length, program = load_i64(state + BASE), load_i64(state + LENGTH), load_i64(state + PROGRAM)
    while number - base < length:
        chunks = load_i64(load_i64(program + (number - base) * OP_BYTES + 16))
        if chunks > 0:
            atomic_store(state + DONE, 0)
            atomic_store(state + TICKET, (number << 32) | chunks)
            return
        number += 1
    atomic_store(state + TICKET, number << 32)
    atomic_store(state + FINISHED, number)


@inline
def _take(state: Address, ticket: int) -> None:
    """Do one chunk of the operation the ticket shows, if nobody was faster; whether one was done."""
    if not compare_swap(state + TICKET, ticket, ticket - 1):
        return
    number = ticket >> 32
    op = load_i64(state + PROGRAM) + (number - load_i64(state + BASE)) * OP_BYTES
    chunks = load_i64(load_i64(op + 16))
    call_kernel(load_i64(op), load_i64(op + 8), chunks - (ticket & 0xFFFFFFFF))
    if atomic_add(state + DONE, 1) + 1 == chunks:
        _open(state, number + 1)


@function
def run_program(state: Address, program: Address, length: int) -> None:
    """Run a program to its end, together with whichever workers are awake."""
    base = (atomic_load(state + TICKET) >> 32) + 1
    atomic_store(state + PROGRAM, program)
    atomic_store(state + BASE, base)
    atomic_store(state + LENGTH, length)
    _open(state, base)
    idle = 0
    while atomic_load(state + FINISHED) != base + length:
        ticket = atomic_load(state + TICKET)
        if ticket & 0xFFFFFFFF:
            _take(state, ticket)
            idle = 0
        else:
            pause()
            idle += 1
            if idle % _SPINS_PER_YIELD == 0:
                sched_yield()


@inline
def _park(state: Address, parked: Address) -> Any:
    """Park; False if a program has begun meanwhile. Whoever begins one says so first and looks who is parked afterwards."""
    atomic_swap(parked, 1)
    if atomic_load(state + RUNNING) == 0:
        return True
    return atomic_swap(parked, 0) == 0  # claimed: the bell rings


@function
def work(state: Address, parked: Address, spins: int) -> None:
    """A worker's turn: take chunks as they come; return, parked, once no program has run for ``spins`` looks, or at the end."""
    idle = 0
    while atomic_load(state + STOP) == 0:
        ticket = atomic_load(state + TICKET)
        if ticket & 0xFFFFFFFF:
            _take(state, ticket)
            idle = 0
            continue
        pause()
        idle += 1
        if idle % _SPINS_PER_YIELD == 0:
            sched_yield()
        if idle >= spins and atomic_load(state + RUNNING) == 0 and _park(state, parked):
            return


@function
def wake(parked: Address) -> Any:
    """Claim a parked worker: whether it was parked."""
    return atomic_swap(parked, 0)


class Pool:
    """``threads`` threads in all: the caller's and threads - 1 workers, which end when the pool is closed or nobody has it any more.

    A process that was forked has a copy of the pool without its workers: it starts its own.
    """

    def __init__(self, threads: int, spins: int = 20_000) -> None:
        self.threads = threads
        self._spins = spins
        for fn in (run_program, work, wake):
            fn.get()
        self._start()

    def run(self, program: NDArray[np.int64]) -> None:
        """Run a program ([operations, 3]); returns when its last operation is done."""
        if self._pid != os.getpid():
            self._start()
        shared = self._shared
        with self._lock:
            shared.store(RUNNING, 1)
            for i, bell in enumerate(shared.bells):
                if wake(shared.parked(i)):
                    bell.release()
            run_program(shared.state, program.ctypes.data, len(program))
            shared.store(RUNNING, 0)

    def close(self) -> None:
        """Let the workers end."""
        with self._lock:
            self._end()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._shared = shared = _Shared(self.threads - 1)
        self._end = weakref.finalize(self, _end, shared)
        for i in range(self.threads - 1):
            shared.store(PARKED + 64 * i, 1)
            threading.Thread(
                target=_serve, args=(shared, i, self._spins), name=f"shoal-worker-{i}", daemon=True
            ).start()


class _Shared:
    """What a pool and its workers share. Workers know nothing of the pool, so that it can be collected while they wait."""

    def __init__(self, workers: int) -> None:
        self._memory: NDArray[np.int64] = np.zeros((_STATE_BYTES + 64 * (workers + 2)) // 8, np.int64)
        self.state = -(-self._memory.ctypes.data // 64) * 64
        self.bells = [threading.Semaphore(0) for _ in range(workers)]

    def parked(self, index: int) -> int:
        """The address that says whether a worker is parked."""
        return self.state + PARKED + 64 * index

    def store(self, offset: int, value: int) -> None:
        self._memory[(self.state + offset - self._memory.ctypes.data) // 8] = value

    def load(self, offset: int) -> int:
        return int(self._memory[(self.state + offset - self._memory.ctypes.data) // 8])


def _serve(shared: _Shared, index: int, spins: int) -> None:
    """A worker's life."""
    while True:
        shared.bells[index].acquire()
        if shared.load(STOP):
            return
        work(shared.state, shared.parked(index), spins)


def _end(shared: _Shared) -> None:
    shared.store(STOP, 1)
    for bell in shared.bells:
        bell.release()


def program(ops: list[tuple[int, int, int]]) -> NDArray[np.int64]:
    """A program from (kernel address, arguments address, address of the number of chunks)."""
    return np.array(ops, np.int64).reshape(len(ops), 3)
