"""Rows in line for workers that come and go: each leaves once, and where it should."""

from __future__ import annotations

import json
from collections import Counter
from itertools import count

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.jobs.input.rows import Line
from shoal.ray.row_line import CONDEMNED, SUSPECT, RowLine

WINDOW = 3


def line(number: int, prompt: str = "") -> Line:
    return Line(number, json.dumps({"custom_id": f"row {number}", "prompt": prompt or f"prompt {number}"}).encode())


class Workers(RuleBasedStateMachine):
    """Whatever order things happen in, a row is at one place, or has left."""

    def __init__(self) -> None:
        super().__init__()
        self.line = RowLine(WINDOW)
        self.names = (f"worker {number}" for number in count())
        self.held: dict[str, set[int]] = {}
        self.taken = 0
        self.left: Counter[int] = Counter()

    @rule()
    def join(self) -> None:
        name = next(self.names)
        self.line.join(name)
        self.held[name] = set()

    @precondition(lambda self: self.line.has_room)
    @rule(same=st.booleans())
    def take(self, same: bool) -> None:
        self.taken += 1
        self.line.take(line(self.taken, "a shared prompt" if same else ""))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.held)))
        numbers = {given.number for given in self.line.give(name)}
        assert not numbers & set().union(*self.held.values())
        assert not numbers & self.left.keys()
        self.held[name] |= numbers

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(name for name, rows in self.held.items() if rows)))
        rows = data.draw(st.sets(st.sampled_from(sorted(self.held[name])), min_size=1))
        others = set().union(*(held for other, held in self.held.items() if other != name))
        assert self.line.take_back(name, rows | others) == rows
        self.left.update(rows)
        self.held[name] -= rows

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.held)))
        condemned = {given.number for given in self.line.lose(name)}
        assert condemned <= self.held[name]
        assert not condemned or len(self.held[name]) == 1, "only in company"
        self.left.update(condemned)
        del self.held[name]
        assert self.line.take_back(name, range(self.taken + 1)) == set(), "it is gone"

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        assert all(times == 1 for times in self.left.values())
        assert self.line.num_rows == self.taken - len(self.left)
        assert all(len(rows) <= WINDOW for rows in self.held.values())
        assert all(self.line.held(name) == len(rows) for name, rows in self.held.items())

    def teardown(self) -> None:
        """What is left gets done, by the workers that are there or one more."""
        if not self.held:
            self.join()
        for _ in range(4 * self.taken + 4):
            for name in self.held:
                self.held[name] |= {given.number for given in self.line.give(name)}
                done = self.line.take_back(name, self.held[name])
                assert done == self.held[name]
                self.left.update(done)
                self.held[name] = set()
        assert self.left == Counter(range(1, self.taken + 1))
        assert self.line.num_rows == 0
        assert self.line.has_room


Workers.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestWorkers = Workers.TestCase


def test_no_row_is_taken_without_a_worker() -> None:
    line_of_rows = RowLine(WINDOW)
    assert not line_of_rows.has_room
    line_of_rows.join("a")
    for number in range(1, WINDOW + 1):
        assert line_of_rows.has_room
        line_of_rows.take(line(number))
    assert not line_of_rows.has_room


def test_rows_that_begin_alike_go_to_one_worker_while_it_has_room() -> None:
    rows = RowLine(window=10)
    for name in "abcd":
        rows.join(name)
    for number in range(12):
        rows.take(line(number, "Be brief. " * 40 + str(number)))
    loads = sorted(len(rows.give(name)) for name in "abcd")
    assert loads[-1] == 10, "the others are spilled"


def test_prompts_that_differ_are_spread() -> None:
    rows = RowLine(window=1000)
    for name in "abcd":
        rows.join(name)
    for number in range(1000):
        rows.take(line(number))
    assert min(len(rows.give(name)) for name in "abcd") > 100


def test_a_worker_that_comes_moves_only_its_own_share() -> None:
    few, more = RowLine(window=1000), RowLine(window=1000)
    for name in "abc":
        few.join(name)
    for name in "abcd":
        more.join(name)
    homes: list[dict[int, str]] = []
    for rows, names in ((few, "abc"), (more, "abcd")):
        for number in range(500):
            rows.take(line(number))
        homes.append({given.number: name for name in names for given in rows.give(name)})
    assert all(homes[1][number] in (home, "d") for number, home in homes[0].items())


def test_a_row_that_takes_workers_with_it_is_found_and_harms_no_other() -> None:
    rows, names = RowLine(WINDOW), (f"worker {i}" for i in count())
    lost, number = 0, 0
    done: set[int] = set()
    condemned: list[Line] = []
    at_work: set[str] = set()
    while len(done) + len(condemned) < 60:
        while len(at_work) < 2:
            at_work.add(name := next(names))
            rows.join(name)
        while rows.has_room and number < 60:
            number += 1
            rows.take(line(number))
        for name in sorted(at_work):
            given = {row.number for row in rows.give(name)}
            if 7 in given:
                condemned += rows.lose(name)
                at_work.remove(name)
                lost += 1
            else:
                done |= rows.take_back(name, given)
    assert [row.number for row in condemned] == [7]
    assert done == set(range(1, 61)) - {7}
    assert lost == SUSPECT + CONDEMNED


def test_one_worker_alone_gets_through_suspects_too() -> None:
    rows = RowLine(WINDOW)
    for incarnation in range(SUSPECT):
        rows.join(f"worker {incarnation}")
        if not incarnation:
            for number in range(1, WINDOW + 1):
                rows.take(line(number))
        rows.give(f"worker {incarnation}")
        assert not rows.lose(f"worker {incarnation}")
    rows.join("last")
    done: list[set[int]] = []
    while rows.num_rows:
        given = {row.number for row in rows.give("last")}
        assert not rows.give("last"), "it holds a suspect"
        done.append(rows.take_back("last", given))
    assert sorted(done, key=min) == [{1}, {2}, {3}]
    assert rows.num_returned == 2 * WINDOW


def test_what_is_dropped_is_gone() -> None:
    rows = RowLine(WINDOW)
    rows.join("a")
    rows.take(line(1))
    rows.give("a")
    rows.take(line(2))
    rows.clear()
    assert rows.num_rows == 0
    assert rows.has_room
    assert rows.take_back("a", [1, 2]) == set()


def test_what_its_worker_has_no_room_for_goes_to_the_one_with_the_least_to_do() -> None:
    line_up = RowLine(100)
    for name in "abcd":
        line_up.join(name)
    for number in range(100):  # all of one prefix: its worker is full
        line_up.take(line(number, "same"))
    loads = {name: len(line_up.give(name)) for name in "abcd"}
    home = max(loads, key=lambda name: loads[name])
    assert sorted(loads.values()) == [0, 0, 0, 100]
    for number in range(100, 130):
        line_up.take(line(number, "same"))
    others = {name: len(line_up.give(name)) for name in "abcd" if name != home}
    assert list(others.values()) == [10, 10, 10]
    light = next(iter(others))
    line_up.take_back(light, range(100, 130))
    for number in range(130, 135):
        line_up.take(line(number, "same"))
    assert len(line_up.give(light)) == 5


def test_a_line_that_runs_for_long_does_not_grow() -> None:
    line_up = RowLine(WINDOW)
    for name in "ab":
        line_up.join(name)
    for number in range(1000):
        line_up.take(line(number))
        for name in "ab":
            line_up.take_back(name, [row.number for row in line_up.give(name)])
    assert line_up.num_rows == 0
    assert len(line_up._by_load) < 20
