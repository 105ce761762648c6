"""Ids: in order, of one form, and nothing else passes for one."""

from __future__ import annotations

import pytest

from shoal.server.store.ids import IdMaker


def test_ids_are_in_order_whatever_the_clock_does(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = IdMaker("file-")
    first = ids.next()
    monkeypatch.setattr("time.time_ns", lambda: 5)
    made = [first, *(ids.next() for _ in range(100))]
    made.append(IdMaker("file-", made[-1]).next())
    assert made == sorted(set(made))
    assert all(ids.owns(name) for name in made)


@pytest.mark.parametrize(
    "text", ["", "file-", "file-../../etc/passwd", "file-" + "G" * 28, "batch_" + "0" * 28, "file-" + "0" * 29]
)
def test_other_texts_are_no_ids(text: str) -> None:
    assert not IdMaker("file-").owns(text)
