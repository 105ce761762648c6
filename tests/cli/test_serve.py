"""``shoal serve`` as a process: how it begins, what signals do, and what survives a kill."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoal.llm import LLM
from shoal.params import SamplingParams
from tests.support.tiny_model import write_tiny_model

FLAGS = ["--device", "reference", "--max-num-seqs", "4", "--max-model-len", "256"]


class Served:
    """A server process, and what it says on stderr."""

    def __init__(self, model: Path, data: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "shoal.cli.main", "serve", str(model), "--port", "0", "--data-dir", str(data)]
        self.process = subprocess.Popen(
            [*command, *FLAGS, *flags], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, env=environment()
        )
        self.lines: list[str] = []
        self.url = ""
        # A connection that is kept may be closed by the server, idle for long, at the moment in which it is used again. No TLS here:
        # its context takes long to make.
        self._client = httpx.Client(timeout=None, verify=False, limits=httpx.Limits(max_keepalive_connections=0))
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if "listening on" in line:
                self.url = line.rpartition(" ")[2].strip()

    def loaded(self) -> Served:
        """Wait until it answers."""
        until(lambda: bool(self.url) or self.process.poll() is not None)
        until(lambda: self.process.poll() is not None or self.get("/health").status_code == 200)
        assert self.process.poll() is None, self.lines
        return self

    def get(self, path: str) -> httpx.Response:
        return self._client.get(self.url + path)

    def post(self, path: str, body: Any) -> httpx.Response:
        named = {"model": "tiny"} if path == "/v1/completions" else {}
        return self._client.post(self.url + path, json=named | body)

    def end(self) -> int:
        """Wait for its end; the exit code."""
        code = self.process.wait()
        self._client.close()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code

    def kill(self) -> None:
        """Whatever it is doing."""
        self.process.kill()
        self.end()


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "SHOAL_API_KEY"}


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
def serve(model: Path, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Starts servers, and leaves none behind."""
    started: list[Served] = []

    def start(*flags: str, model: Path = model) -> Served:
        started.append(Served(model, tmp_path / "data", *flags))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.kill()


def test_sigterm_under_load_loses_nothing_that_was_promised(serve: Callable[..., Served], model: Path) -> None:
    server = serve("--max-num-seqs", "8").loaded()
    body = {"model": "tiny", "max_tokens": 100, "temperature": 0, "ignore_eos": True, "stream": True}
    answers: dict[int, str] = {}
    begun = threading.Barrier(9)

    def ask(number: int) -> None:
        asked = body | {"prompt": f"prompt {number}"}
        with httpx.stream("POST", server.url + "/v1/completions", json=asked, timeout=None) as response:
            lines = response.iter_lines()
            first = next(lines)
            begun.wait()
            answers[number] = text_of([first, *lines])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    begun.wait()
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert server.end() == 0
    with LLM(model, device="reference", max_model_len=256) as llm:
        params = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
        expected = llm.generate([f"prompt {number}" for number in range(8)], params, use_tqdm=False)
    assert answers == {number: output.outputs[0].text for number, output in enumerate(expected)}


def text_of(lines: list[str]) -> str:
    *events, done = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert done == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def refuses(server: Served) -> bool:
    """Whether it drains. It closes connections that are idle when that begins, which may be just when a request is on its way."""
    try:
        return server.get("/health").status_code == 503
    except httpx.TransportError:
        return False


def test_a_second_signal_ends_it_at_once(serve: Callable[..., Served]) -> None:
    server = serve("--drain-timeout", "600", "--stall-timeout", "600").loaded()
    # More than fits into all buffers, as this side's stay small, and it is not read: the answer stays under way.
    small = httpx.HTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)])
    body = {
        "model": "tiny",
        "prompt": "x",
        "max_tokens": 240,
        "n": 16,
        "ignore_eos": True,
        "stream": True,
        "logprobs": 20,
    }
    with (
        httpx.Client(transport=small, timeout=None) as client,
        client.stream("POST", server.url + "/v1/completions", json=body) as response,
    ):
        lines = response.iter_lines()  # which ends the request when it is let go of
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: refuses(server))
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 128 + signal.SIGTERM


def test_health_answers_while_a_long_prompt_is_computed(serve: Callable[..., Served], tmp_path: Path) -> None:
    long = write_tiny_model(tmp_path / "long.gguf", context=8192, layers=8)
    server = serve("--device", "cpu", "--max-model-len", "8000", model=long).loaded()
    answers: list[httpx.Response] = []
    body = {"prompt": "x" * 6000, "max_tokens": 1}
    asking = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", body)))
    asking.start()
    until(lambda: any(slot["state"] == "prefill" for slot in server.get("/slots").json()))
    during = 0
    while not answers:
        assert server.get("/health").status_code == 200
        during += not answers
    asking.join()
    assert during > 0
    assert answers[0].status_code == 200


def test_a_batch_survives_a_kill_of_its_server(serve: Callable[..., Served], model: Path) -> None:
    rows = [
        {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions"}
        | {
            "body": {
                "prompt": f"prompt {number}",
                "max_tokens": 20,
                "seed": number,
                "temperature": 1.0 if number % 5 else -1,
            }
        }
        for number in range(60)
    ]
    data = "".join(json.dumps(row) + "\n" for row in rows)
    server = serve().loaded()
    upload = {"file": ("rows.jsonl", data)}
    file = httpx.post(server.url + "/v1/files", files=upload, data={"purpose": "batch"}, timeout=None).json()
    asked = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = server.post("/v1/batches", asked).json()
    for _ in range(3):
        while not counted(server, batch["id"]):
            time.sleep(0.01)
        server.kill()
        server = serve().loaded()
    until(lambda: ended(server, batch["id"]))
    done = server.get(f"/v1/batches/{batch['id']}").json()
    assert done["status"] == "completed"
    assert (done["request_counts"]["completed"], done["request_counts"]["failed"]) == (48, 12)
    records = [
        json.loads(line)
        for kind in ("output_file_id", "error_file_id")
        for line in server.get(f"/v1/files/{done[kind]}/content").text.splitlines()
    ]
    assert sorted(record["custom_id"] for record in records) == sorted(str(row["custom_id"]) for row in rows)
    texts = {record["custom_id"]: record["response"]["body"].get("choices") for record in records}
    with LLM(model, device="reference", max_model_len=256) as llm:
        params = [SamplingParams(max_tokens=20, seed=number, temperature=1.0) for number in range(60)]
        outputs = llm.generate([f"prompt {number}" for number in range(60)], params, use_tqdm=False)
    for number, output in enumerate(outputs):
        choices = texts[f"r{number}"]
        assert choices is None if number % 5 == 0 else choices[0]["text"] == output.outputs[0].text


def counted(server: Served, batch_id: str) -> int:
    counts: dict[str, int] = server.get(f"/v1/batches/{batch_id}").json()["request_counts"]
    return counts["completed"] + counts["failed"]


def ended(server: Served, batch_id: str) -> bool:
    return server.get(f"/v1/batches/{batch_id}").json()["status"] in ("completed", "failed")


def test_what_cannot_start_says_why_in_a_line(serve: Callable[..., Served], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"GGUF" + bytes(100))
    server = serve(model=wrong)
    assert server.end() == 2
    assert len(server.lines) == 1
    assert "wrong.gguf" in server.lines[0]
    small = serve("--kv-cache-memory", "1k")
    assert small.end() == 2
    assert any("the model cannot be loaded" in line and "kv_cache_memory" in line for line in small.lines), small.lines
    first = serve().loaded()
    port = first.url.rpartition(":")[2]
    second = serve("--port", port, "--data-dir", str(tmp_path / "other"))
    assert second.end() == 2
    assert f"port: got {port}" in second.lines[-1]


def test_flags_are_checked_before_anything_is_loaded(serve: Callable[..., Served]) -> None:
    for flags, named in (
        (("--max-waiting", "-1"), "max_waiting: got -1"),
        (("--request-timeout", "0"), "request_timeout: got 0"),
        (("--max-file-size", "much"), "max_file_size"),
        (("--api-key", "with space"), "api_key"),
    ):
        server = serve(*flags)
        assert server.end() == 2
        assert named in server.lines[-1]


def test_keys_keep_each_others_prefixes_and_priorities_apart(serve: Callable[..., Served]) -> None:
    flags = ("--api-key", "one", "--api-key", "two", "--isolate-prefix-cache", "--access-log", "--log-prompts")
    server = serve(*flags).loaded()
    body = {
        "model": "tiny",
        "prompt": "a prompt that is long enough for whole pages of it",
        "max_tokens": 2,
        "temperature": 0,
    }

    def cached(key: str, **more: Any) -> int:
        headers = {"authorization": f"Bearer {key}"}
        answer = httpx.post(server.url + "/v1/completions", json=body | more, headers=headers, timeout=None).json()
        tokens: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return tokens

    assert cached("one") == 0
    assert cached("one") > 0
    assert cached("two") == 0
    assert cached("one", cache_salt="mine") == 0
    assert cached("one", cache_salt="mine") > 0
    refused = httpx.post(
        server.url + "/v1/completions", json=body | {"priority": -1}, headers={"x-api-key": "two"}, timeout=None
    )
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")
    assert server.post("/v1/completions", body).status_code == 401
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    logged = [json.loads(line) for line in server.lines if line.startswith("{") and "completions" in line]
    assert logged[0]["texts"][0]["prompt"] == body["prompt"]
    assert logged[0]["tokens"] == {"prompt": len(str(body["prompt"])), "completion": 2}
    assert len({line["owner"] for line in logged if line["status"] == 200}) == 2
    assert not any("Bearer" in line or '"one"' in line for line in server.lines)
