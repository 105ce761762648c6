"""Who is let in by a replica. How it serves is in test_serve_app."""

from __future__ import annotations

import pytest

from shoal.errors import ParameterError
from shoal.params import EngineConfig
from shoal.ray.replica import Setup, name_of, read_secret

SECRET = "a-secret-of-the-nets"


def test_a_secret_is_the_given_one() -> None:
    assert read_secret(SECRET) == SECRET


@pytest.mark.parametrize("variable", [None, ""])
def test_a_secret_is_new_where_none_is_given(variable: str | None) -> None:
    assert len({read_secret(variable) for _ in range(3)} - {"", None}) == 3


@pytest.mark.parametrize(
    "variable", ["too-short", "x" * 513, "a secret of the nets", SECRET + "\r\nx: y", SECRET + "\u00e9"]
)
def test_what_cannot_be_a_secret_is_refused_and_not_shown(variable: str) -> None:
    with pytest.raises(ParameterError, match=r"^SHOAL_SERVE_SECRET: got") as refused:
        read_secret(variable)
    assert refused.value.value == "..."


def test_its_name_does_not_show_it() -> None:
    assert name_of(SECRET) == name_of(SECRET) != name_of(SECRET + "s")
    assert SECRET not in name_of(SECRET)
    setup = Setup(model="m", config=EngineConfig(), served=(), settings={}, secret=SECRET)
    assert SECRET not in repr(setup)
