"""``shoal bench serve`` as a user runs it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench.serve.stub import Stub, good
from tests.cli.conftest import Shoal

LOAD = ["--num-prompts", "5", "--random-input-len", "8", "--random-output-len", "3"]


@pytest.fixture
def stub() -> Iterator[Stub]:
    with Stub(good) as running:
        yield running


def test_serve(shoal: Shoal, stub: Stub, tmp_path: Path) -> None:
    flags = ["--ignore-eos", "--temperature", "0", "--extra-body", '{"top_k": 1}', "--health-probe", "--api-key", "k"]
    done = shoal("bench", "serve", "--base-url", stub.url, *LOAD, *flags, "--output-json", "out.json")
    assert done.returncode == 0, done.stderr
    assert "Successful requests:                     5\n" in done.stdout
    assert "P99 TTFT (ms):" in done.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["model_id"], found["request_rate"], found["num_prompts"]) == ("org/first", "inf", 5)
    assert (found["total_output_tokens"], found["health_failed"]) == (15, 0)
    assert "itls" not in found
    body = stub.posts[0]
    assert (body["ignore_eos"], body["temperature"], body["top_k"]) == (True, 0, 1)
    assert {request.headers["authorization"] for request in stub.requests} == {"Bearer k"}


def test_the_key_of_the_environment(shoal: Shoal, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "from-here")
    done = shoal("bench", "serve", "--base-url", stub.url, *LOAD)
    assert done.returncode == 0, done.stderr
    assert {request.headers["authorization"] for request in stub.requests} == {"Bearer from-here"}
    assert "from-here" not in done.stdout + done.stderr


def test_host_and_port_and_chats(shoal: Shoal, stub: Stub) -> None:
    port = stub.url.rpartition(":")[2]
    done = shoal("bench", "serve", "--port", port, "--backend", "openai-chat", *LOAD)
    assert done.returncode == 0, done.stderr
    assert {request.path for request in stub.requests} == {"/v1/models", "/v1/chat/completions"}


def test_results_are_saved_under_vllm_s_names(shoal: Shoal, stub: Stub, tmp_path: Path) -> None:
    rate = ["--request-rate", "1000", "--max-concurrency", "2", "--burstiness", "2"]
    saved = ["--save-result", "--save-detailed", "--result-dir", "results"]
    done = shoal("bench", "serve", "--base-url", stub.url, *LOAD, *rate, *saved)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").iterdir()
    assert path.name.startswith("openai-1000.0qps-concurrency2-first-2")
    found = json.loads(path.read_text())
    assert (found["request_rate"], found["burstiness"], found["max_concurrency"]) == (1000.0, 2.0, 2)
    assert found["output_lens"] == [3] * 5
    assert "Request rate configured (RPS):           1000.00\n" in done.stdout


@pytest.mark.parametrize(
    "goals",
    [["--goodput", "ttft:60000", "tpot:60000"], ["--goodput", "ttft:60000", "--goodput", "tpot:60000"]],
)
def test_goals_in_vllm_s_way_and_in_click_s(shoal: Shoal, stub: Stub, tmp_path: Path, goals: list[str]) -> None:
    done = shoal("bench", "serve", "--base-url", stub.url, *LOAD, *goals, "--output-json", "out.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["request_goodput"] == found["request_throughput"]


def test_two_servers_in_turns(shoal: Shoal, stub: Stub, tmp_path: Path) -> None:
    with Stub(good) as other:
        flags = ["--label", "ours", "--also", f"theirs={other.url}", "--rounds", "2", "--output-json", "out.json"]
        done = shoal("bench", "serve", "--base-url", stub.url, *LOAD, *flags)
    assert done.returncode == 0, done.stderr
    assert "|  | ours | theirs | ours over theirs |" in done.stdout
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == [
        "round 1/2, ours",
        "round 1/2, theirs",
        "round 2/2, ours",
        "round 2/2, theirs",
    ]
    found = json.loads((tmp_path / "out.json").read_text())
    assert {name: len(rounds) for name, rounds in found["servers"].items()} == {"ours": 2, "theirs": 2}
    assert len(found["ratios"]["theirs"]["output_throughput"]) == 2
    assert len(stub.posts) == len(other.posts) == 10


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--goodput", "ttft"], "'ttft' is not NAME:MILLISECONDS such as ttft:200."),
        (["--goodput", "speed:1"], "goodput: got 'speed:1.0', must be some of ttft, tpot, e2el"),
        (["ttft:200"], "Got unexpected extra argument (ttft:200)."),
        (["--percentile-metrics", "speed"], "percentile_metrics: got 'speed'"),
        (["--metric-percentiles", "most"], "'most' is not percentages with commas between them."),
        (["--request-rate", "0"], "request_rate: got 0.0, must be above 0"),
        (["--random-range-ratio", "1"], "random_range_ratio: got 1.0"),
        (["--extra-body", "[]"], "'[]' is not a JSON object."),
        (["--also", "here"], "'here' is not NAME=URL with a name of its own."),
        (["--also", "openai=http://here"], "the first server has that name"),
        (["--base-url", "here"], "base_url: got 'here', must be an address such as http://127.0.0.1:8000"),
    ],
)
def test_what_cannot_be_measured_is_one_line(shoal: Shoal, flags: list[str], said: str) -> None:
    done = shoal("bench", "serve", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr


def test_a_server_that_is_not_there_is_one_line(shoal: Shoal) -> None:
    with Stub(good) as gone:
        pass
    done = shoal("bench", "serve", "--base-url", gone.url)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"openai ({gone.url}) is not ready: GET /v1/models: " in done.stderr
