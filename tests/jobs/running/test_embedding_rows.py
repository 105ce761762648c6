"""Rows for /v1/embeddings: each input a request, one record a row, and what is refused or fails named."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.jobs.durable.ledger import Ledger
from shoal.jobs.input.rows import LineReader, RowReader
from shoal.jobs.running.engine_half import LocalHalf
from shoal.jobs.running.job import Job, JobLimits
from shoal.llm import LLM
from tests.support.tiny_encoders import TINY_ENCODERS

TEXTS = ["abc def", "a", "dad cab"]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = tmp_path_factory.mktemp("bert") / "tiny.gguf"
    dataclasses.replace(TINY_ENCODERS["bert"], words=True).write(path)
    with LLM(path, device="reference", max_num_seqs=2, max_num_batched_tokens=32) as llm:
        yield llm


def line(custom_id: str, url: str = "/v1/embeddings", **body: Any) -> bytes:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}).encode() + b"\n"


def run(llm: LLM, data: bytes, folder: Path, timeout: float | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results and errors by custom_id."""
    with Ledger.open(folder / "journal", folder / "results", folder / "errors") as ledger:
        reader = RowReader(["tiny"], {"max_tokens": 5})
        half = LocalHalf(llm, reader, ["tiny"], timeout)
        rows = iter(LineReader(io.BytesIO(data)))
        assert Job(half, reader, ledger).run(rows, None, lambda progress: None) == "finished"
    found = []
    for name in ("results", "errors"):
        path = folder / name
        records = [json.loads(text) for text in path.read_bytes().splitlines()] if path.exists() else []
        assert len({record["custom_id"] for record in records}) == len(records)
        found.append({record["custom_id"]: record for record in records})
    assert not llm.has_work
    return found[0], found[1]


def test_every_form_of_input(llm: LLM, tmp_path: Path) -> None:
    ids = llm.encode(TEXTS[0])
    data = b"".join(
        (
            line("text", input=TEXTS[0], model="tiny", user="somebody"),
            line("texts", input=TEXTS),
            line("ids", input=ids),
            line("lists", input=[ids, llm.encode(TEXTS[1])], encoding_format="float"),
            line("base64", input=TEXTS, encoding_format="base64"),
            line("short", input=TEXTS[0], dimensions=8),
            line("cut", input="a " * 100, truncate_prompt_tokens=6),
        )
    )
    results, errors = run(llm, data, tmp_path)
    assert not errors
    expected = [output.outputs.embedding for output in llm.embed(TEXTS)]
    bodies = {name: record["response"]["body"] for name, record in results.items()}

    def vectors(name: str) -> list[Any]:
        assert [item["index"] for item in bodies[name]["data"]] == list(range(len(bodies[name]["data"])))
        return [item["embedding"] for item in bodies[name]["data"]]

    assert vectors("text") == vectors("ids") == expected[:1]
    assert vectors("texts") == expected
    assert vectors("lists") == expected[:2]
    decoded = [np.frombuffer(base64.b64decode(text), "<f4") for text in vectors("base64")]
    assert np.array_equal(decoded, np.array(expected, np.float32))
    assert len(vectors("short")[0]) == 8
    assert bodies["cut"]["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    assert bodies["texts"]["usage"]["total_tokens"] == sum(len(llm.encode(text)) for text in TEXTS)
    assert (bodies["text"]["object"], bodies["text"]["data"][0]["object"]) == ("list", "embedding")
    assert bodies["text"]["model"] == "tiny"


def test_what_is_refused_says_which_field(llm: LLM, tmp_path: Path) -> None:
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "none": ({}, "input"),
        "empty": ({"input": ""}, "input"),
        "no items": ({"input": []}, "input"),
        "an empty item": ({"input": ["a", ""]}, "input"),
        "mixed": ({"input": ["a", 5]}, "input"),
        "many": ({"input": ["a"] * 2049}, "input"),
        "long": ({"input": ["a", "a " * 100]}, "input"),
        "id": ({"input": [1 << 20]}, "input"),
        "format": ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        "dimensions": ({"input": "a", "dimensions": 41}, "dimensions"),
        "no dimensions": ({"input": "a", "dimensions": 0}, "dimensions"),
        "cut": ({"input": "a", "truncate_prompt_tokens": 99}, "truncate_prompt_tokens"),
        "temperature": ({"input": "a", "temperature": 1}, "temperature"),
    }
    data = b"".join(line(name, **body) for name, (body, _) in wrong.items())
    data += line("chat", "/v1/completions", prompt="a") + line("good", input="a")
    results, errors = run(llm, data, tmp_path)
    assert set(results) == {"good"}
    for name, (_, field) in wrong.items():
        response = errors[name]["response"]
        assert (response["status_code"], response["body"]["error"]["param"]) == (400, field), response
        assert response["body"]["error"]["code"] == ("context_length_exceeded" if name == "long" else None)
    assert "34 tokens" not in errors["long"]["response"]["body"]["error"]["message"]
    assert "102 tokens" in errors["long"]["response"]["body"]["error"]["message"]
    assert "bert is an encoder" in errors["chat"]["response"]["body"]["error"]["message"]


def test_a_row_whose_time_is_up_fails_as_a_whole(llm: LLM, tmp_path: Path) -> None:
    results, errors = run(llm, line("late", input=TEXTS * 20), tmp_path, 1e-6)
    assert not results
    assert errors["late"]["error"]["code"] == "request_timeout"


def test_a_job_that_ends_early_leaves_nothing_behind(llm: LLM, tmp_path: Path) -> None:
    limits = JobLimits(cancelled=lambda: llm.engine.stats().waiting > 0)
    with Ledger.open(tmp_path / "journal", tmp_path / "results", tmp_path / "errors") as ledger:
        reader = RowReader(["tiny"])
        job = Job(LocalHalf(llm, reader, ["tiny"]), reader, ledger, limits)
        job._next_look = 0.0
        rows = iter(LineReader(io.BytesIO(line("a", input=TEXTS * 200))))

        def look_again(progress: object) -> None:
            job._next_look = 0.0

        assert job.run(rows, None, look_again) == "cancelled"
    assert json.loads((tmp_path / "errors").read_text())["error"]["code"] == "batch_cancelled"
    assert not llm.has_work or not any(llm.step() for _ in range(3))
    assert llm.engine.stats().running == llm.engine.stats().waiting == 0
