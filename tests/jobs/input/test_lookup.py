"""Answers by the number of their row."""

from __future__ import annotations

import json
from pathlib import Path

from shoal.jobs.durable.ledger import Ledger
from shoal.jobs.input.lookup import answers


def line(choice: dict[str, object]) -> bytes:
    return json.dumps(
        {"id": "x", "custom_id": "y", "response": {"body": {"choices": [choice]}}, "error": None}
    ).encode()


def test_the_answer_of_a_row_is_found_wherever_it_stands(tmp_path: Path) -> None:
    folder, results = tmp_path / "job", tmp_path / "results"
    with Ledger.open(folder, results, tmp_path / "errors") as ledger:
        ledger.add(7, line({"text": "seven"}), failed=False)
        ledger.add(2, line({"message": {"role": "assistant", "content": "zwei, ü"}}), failed=False)
        ledger.commit()
        ledger.add(5, b'{"not": "a result"}', failed=True)
        ledger.add(1, line({"text": ""}), failed=False)
        ledger.commit()
    with answers(folder, results) as answer:
        found = [answer(row) for row in range(10)]
    assert found == [None, "", "zwei, ü", None, None, None, None, "seven", None, None]
    assert {path.name for path in folder.iterdir()} == {"journal"}
