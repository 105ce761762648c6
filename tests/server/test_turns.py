"""Shares between owners, in tokens."""

from __future__ import annotations

import heapq
import random
from collections import Counter

import pytest

from shoal.server.turns import Turns


def served(arrivals: list[tuple[str, int]], rounds: int) -> Counter[str]:
    """Tokens of each owner after so many requests, if the lowest turn is always next. Everybody asks at once."""
    turns, line = Turns(), list[tuple[int, int, str, int]]()
    for number, (owner, tokens) in enumerate(arrivals):
        heapq.heappush(line, (turns.take(owner, tokens), number, owner, tokens))
    done: Counter[str] = Counter()
    for _ in range(rounds):
        turn, _, owner, tokens = heapq.heappop(line)
        turns.begun(turn)
        done[owner] += tokens
    return done


def test_one_who_asks_for_much_does_not_hold_up_the_others() -> None:
    done = served([("greedy", 100)] * 100 + [("modest", 100)] * 10, 20)
    assert done == {"greedy": 1000, "modest": 1000}


def test_shares_are_counted_in_tokens_not_in_requests() -> None:
    rng = random.Random(1)
    arrivals = [("short", 10)] * 1000 + [("long", 200)] * 50
    rng.shuffle(arrivals)
    done = served(arrivals, 500)
    assert done["short"] == pytest.approx(done["long"], abs=200)


def test_nobody_saves_up_turns_while_asking_for_nothing() -> None:
    turns = Turns()
    for _ in range(50):
        turns.begun(turns.take("busy", 100))
    late = [turns.take("late", 100) for _ in range(3)]
    assert late[0] >= 49 * 100
    assert late[1] > turns.take("busy", 100) - 200


def test_what_was_not_taken_is_given_back() -> None:
    turns = Turns()
    turns.take("a", 1000)
    turns.give_back("a", 900)
    assert turns.take("a", 1) == 100
    turns.give_back("nobody", 5)
    turns.give_back("a", 10**9)
    assert turns.take("a", 1) == 0


def test_owners_who_are_as_good_as_new_are_forgotten() -> None:
    turns = Turns()
    for number in range(1000):
        turns.begun(turns.take(f"owner {number}", 10))
        turns.begun(turns.take("clock", 10))
    assert len(turns._next) < 10
