"""What a job came to."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from shoal.jobs.durable.ledger import Totals
from shoal.jobs.running.summary import Summary

TOTALS = Totals(
    done=30,
    failed=10,
    retried=5,
    prompt_tokens=4000,
    cached_tokens=3000,
    generated_tokens=500,
    seconds=2.0,
    steps=50,
    full_steps=40,
    row_steps=300,
)


def summary(totals: Totals = TOTALS, resumed: int = 2, rows: int | None = 40) -> Summary:
    return Summary.of(totals, state="finished", rows=rows, resumed=resumed, output="out", errors="out.errors")


def test_rates_and_shares() -> None:
    found = summary()
    assert found.tokens_per_second == 250.0
    assert found.full_share == 0.8
    assert found.rows_per_step == 6.0


def test_lines_for_people() -> None:
    assert summary().lines() == [
        "finished: 30 rows done, 10 failed of 40, 5 retried, resumed 2 times",
        "4000 prompt (3000 cached) and 500 generated tokens in 2.0 s (250.0 tokens/s);"
        " 80% of 50 steps ran a full batch, on average 6.0 rows",
    ]
    drafted = summary(replace(TOTALS, draft_tokens=200, accepted_tokens=150))
    assert drafted.lines()[2:] == ["200 tokens were computed on a guess, 75% of them were right"]
    assert summary(resumed=1, rows=None).lines()[0] == "finished: 30 rows done, 10 failed, 5 retried, resumed once"


@pytest.mark.parametrize("totals", [Totals(), TOTALS])
def test_it_survives_json(totals: Totals) -> None:
    found = summary(totals)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Summary) == found
