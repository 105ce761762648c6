from __future__ import annotations

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.sequence import Metrics, Order, Request, Sequence, Status
from shoal.engine.waiting import WaitingQueue
from shoal.params import SamplingParams

REQUEST = Request("r", (1,), SamplingParams())


def sequence(order: Order) -> Sequence:
    return Sequence(REQUEST, 10, Metrics(0.0), order=order, status=Status.HELD)


@given(
    st.lists(st.tuples(st.integers(-2, 2), st.integers(0, 3)), max_size=200),
    st.lists(st.sampled_from(["pop", "drop", "back"]), max_size=200),
    st.randoms(use_true_random=False),
)
def test_the_first_is_always_the_least(orders: list[tuple[int, int]], steps: list[str], rng: random.Random) -> None:
    queue = WaitingQueue()
    held = [sequence((priority, turn, number, 0)) for number, (priority, turn) in enumerate(orders)]
    for seq in held:
        queue.push(seq)
    out: list[Sequence] = []
    for step in steps:
        assert len(queue) == len(held) == len(list(queue))
        if step == "back" and out:
            queue.push(out.pop())
            held = list(queue)
        elif held and step == "drop":
            queue.drop(held.pop(rng.randrange(len(held))))
        elif held and step == "pop":
            first = min(held, key=lambda seq: seq.order)
            assert queue.first is first
            assert queue.pop() is first
            first.status = Status.RUNNING
            held.remove(first)
            out.append(first)


class Counted(tuple[int, int, int, int]):
    """Counts how often it is compared."""

    comparisons = 0

    def __lt__(self, other: object) -> bool:
        Counted.comparisons += 1
        return tuple.__lt__(self, other)  # type: ignore[operator]


def test_fifty_thousand_in_line_cost_little_more_than_few() -> None:
    rng, queue, most = random.Random(1), WaitingQueue(), 50_000
    held = [sequence(Counted((rng.randrange(9), 0, number, 0))) for number in range(most)]
    for seq in held:
        queue.push(seq)
    assert Counted.comparisons < 4 * most
    Counted.comparisons = 0
    for seq in rng.sample(held, most // 2):
        queue.drop(seq)
    assert Counted.comparisons < 4 * most
    Counted.comparisons = 0
    for _ in range(100):
        first = queue.pop()
        first.status = Status.RUNNING
        queue.push(first)
    assert Counted.comparisons < 100 * 6 * math.log2(most)


def test_those_that_have_ended_are_let_go_of() -> None:
    queue = WaitingQueue()
    for number in range(10_000):
        seq = sequence((0, 0, number, 0))
        queue.push(seq)
        queue.drop(seq)
    assert len(queue._heap) < 200
