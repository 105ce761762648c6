"""How many requests are taken on."""

from __future__ import annotations

import pytest

from shoal.server.room import TooManyWaitingError, WaitingRoom


def test_so_many_run_so_many_wait_and_the_next_is_told_when_to_come_back() -> None:
    room = WaitingRoom(2, 3, 1000)
    for _ in range(5):
        room.enter("a")
    with pytest.raises(TooManyWaitingError, match="5 requests are under way; at most 2 run and 3 wait") as caught:
        room.enter("a")
    assert caught.value.status == 429
    assert caught.value.retry_after >= 1
    room.leave("a", 1.0)
    room.enter("a")
    assert room.rejected == 1


def test_nobody_can_take_all_places() -> None:
    room = WaitingRoom(1, 1, 1000)
    room.enter("a")
    room.enter("a")
    room.enter("b")
    for owner in ("a", "b"):
        with pytest.raises(TooManyWaitingError):
            room.enter(owner)


def test_names_are_bounded_too() -> None:
    room, let_in = WaitingRoom(1, 0, 1000), 0
    for number in range(1000):
        try:
            room.enter(f"owner {number}")
        except TooManyWaitingError:
            continue
        let_in += 1
    assert let_in == 65


def test_prompts_that_wait_have_a_limit_but_one_alone_always_fits() -> None:
    room = WaitingRoom(1, 9, 100)
    room.wait(5000)
    with pytest.raises(
        TooManyWaitingError, match="prompts of 5000 tokens wait; with 1 more the limit of 100 is passed"
    ):
        room.wait(1)
    room.begin(5000)
    room.wait(60)
    room.wait(40)
    assert room.waiting_tokens == 100


def test_advice_follows_what_requests_take() -> None:
    room = WaitingRoom(4, 100, 1000)
    for _ in range(40):
        room.enter("a")
    quick = room.retry_after
    for _ in range(50):
        room.enter("a")
        room.leave("a", 30.0)
    assert quick < room.retry_after <= 60
