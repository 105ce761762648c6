"""The application as a whole: Ray Serve, an ingress and two replicas, each in its own process, on sockets."""

from __future__ import annotations

import json
import runpy
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from ray import serve

from shoal.errors import ParameterError
from shoal.llm import LLM
from shoal.params import SamplingParams
from shoal.ray import serve_app
from tests.ray.local import PATIENCE, local_serve, processes, wait_until
from tests.support.tiny_model import write_tiny_model

KEY = "sk-net"
ENGINE: dict[str, Any] = {"device": "reference", "max_num_seqs": 8, "max_model_len": 1024}
LONG = 600  # tokens: seconds, in which things can happen
SYSTEM = "You mend nets. "


class App:
    """An application, and clients of it."""

    def __init__(self, address: str, path: Path, name: str) -> None:
        self.name, self.path = name, path
        self.url = f"{address}/{name}"
        self.http = httpx.Client(
            base_url=self.url, timeout=PATIENCE, verify=False, headers={"authorization": f"Bearer {KEY}"}
        )
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE)

    def deploy(self, **options: Any) -> App:
        app = serve_app(str(self.path), served_model_name="tiny", api_keys=KEY, **ENGINE, **options)
        serve.run(app, name=self.name, route_prefix=f"/{self.name}")
        wait_until(self._reaches_all)  # the ingress hears of new replicas once a second
        return self

    def _reaches_all(self) -> bool:
        for number in range(4):
            self.complete(f"{number} {time.monotonic()}", max_tokens=1)
        return all(self.counted("shoal:request_success_total"))

    def complete(self, prompt: str, **how: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"model": "tiny", "prompt": prompt, "max_tokens": 8} | how)

    def states(self) -> list[Any]:
        return self._of_each("state")

    def counted(self, name: str) -> list[float]:
        """A metric of each replica."""
        return [counted(text, name) for _, text in self._of_each("metrics")]

    def _of_each(self, method: str) -> list[Any]:
        told: list[Any] = (
            serve.get_deployment_handle("Replica", self.name).broadcast(method).results(timeout_s=PATIENCE)
        )
        return told

    def close(self) -> None:
        self.http.close()
        self.openai.close()
        serve.delete(self.name)


@contextmanager
def deployed(address: str, path: Path, name: str, **options: Any) -> Iterator[App]:
    """An application until the end of the block."""
    app = App(address, path, name)
    try:
        yield app.deploy(**options)
    finally:
        app.close()


def counted(text: str, name: str) -> float:
    """The sum of a metric over its labels."""
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))
    )


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with local_serve() as address:
        yield address


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", context=1024)


@pytest.fixture(scope="module")
def app(address: str, tiny_path: Path) -> Iterator[App]:
    with deployed(address, tiny_path, "shared", replicas=2) as app:
        yield app


def test_every_replica_gives_what_one_machine_gives(app: App) -> None:
    before = app.counted("shoal:request_success_total")
    params: dict[str, Any] = {"seed": 7, "temperature": 0.9, "max_tokens": 12}
    with LLM(app.path, **ENGINE) as llm:
        (alone,) = llm.generate(["A net"], SamplingParams(**params))
    with ThreadPoolExecutor(8) as pool:  # salts send them to all replicas, and mean nothing for the text
        salted = list(pool.map(lambda salt: app.complete("A net", cache_salt=str(salt), **params).json(), range(32)))
    assert {answer["choices"][0]["text"] for answer in salted} == {alone.outputs[0].text}
    assert all(now > then for now, then in zip(app.counted("shoal:request_success_total"), before, strict=True))


def test_a_stream_adds_up_to_the_whole(app: App) -> None:
    messages: Any = [{"role": "user", "content": "Fish?"}]
    how: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 20, "seed": 3}
    whole = app.openai.chat.completions.create(**how)
    chunks = list(app.openai.chat.completions.create(**how, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert len(chunks) > 2


def test_the_other_dialects(app: App) -> None:
    answer = app.openai.responses.create(model="tiny", input="Fish?", max_output_tokens=8)
    assert answer.output_text
    messages: Any = [{"role": "user", "content": "Fish?"}]
    with anthropic.Anthropic(base_url=app.url, api_key=KEY, max_retries=0, timeout=PATIENCE) as client:
        with client.messages.stream(model="tiny", max_tokens=8, messages=messages) as stream:
            told = stream.get_final_message()
        counted = client.messages.count_tokens(model="tiny", messages=messages)
    assert told.usage.input_tokens + (told.usage.cache_read_input_tokens or 0) == counted.input_tokens


def test_small_routes(app: App) -> None:
    assert [model.id for model in app.openai.models.list()] == ["tiny"]
    assert app.http.post("/tokenize", json={"prompt": "net"}).json()["count"] == 3
    assert app.http.get("/openapi.json").json()["openapi"].startswith("3")
    assert app.http.get("/health").json() == {"status": "ok"}
    assert app.http.head("/health").content == b""
    assert app.http.head("/v1/models").status_code == 200
    embedded = app.openai.embeddings.create(model="tiny", input=["net", "boat"])
    assert len(embedded.data) == 2


def test_metrics_are_those_of_all_replicas(app: App) -> None:
    def told() -> float:
        return counted(app.http.get("/metrics").text, "shoal:request_success_total")

    before = told()
    for salt in range(6):
        app.complete("A net", cache_salt=str(salt))
    assert told() == before + 6 == sum(app.counted("shoal:request_success_total"))


@pytest.mark.parametrize(
    ("status", "path", "body", "headers"),
    [
        (400, "/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": -1}, {}),
        (401, "/v1/completions", {"model": "tiny", "prompt": "a"}, {"authorization": "Bearer wrong"}),
        (403, "/v1/completions", {"model": "tiny", "prompt": "a"}, {"origin": "https://elsewhere.example"}),
        (404, "/v1/completions", {"model": "other", "prompt": "a"}, {}),
        (404, "/v1/files", {}, {}),
        (404, "/slots", {}, {}),
        (405, "/health", {}, {}),
        (413, "/v1/completions", {"model": "tiny", "prompt": "a" * (3 << 20)}, {}),
        (415, "/v1/completions", {"model": "tiny", "prompt": "a"}, {"content-type": "text/plain"}),
    ],
)
def test_refusals_are_the_servers(app: App, status: int, path: str, body: Any, headers: dict[str, str]) -> None:
    headers = {"content-type": "application/json"} | headers
    refused = app.http.post(path, content=json.dumps(body), headers={"x-request-id": "net-1"} | headers)
    assert (refused.status_code, refused.headers["x-request-id"]) == (status, "net-1")
    assert refused.json()["error"]["message"]


def test_a_replica_answers_its_ingress_alone(app: App) -> None:
    state = app.states()[0]
    direct = httpx.get(f"http://{state.host}:{state.port}/v1/models", headers={"x-shoal-secret": "guess"})
    assert direct.status_code == 403


def test_a_client_that_goes_frees_the_engine(app: App) -> None:
    before = sum(app.counted("shoal:aborts_total"))
    body = {"model": "tiny", "prompt": "A", "max_tokens": LONG, "ignore_eos": True}
    with app.http.stream("POST", "/v1/completions", json={"model": "tiny", "stream": True} | body) as stream:
        next(stream.iter_lines())
    request = app.http.build_request("POST", "/v1/completions", json=body | {"n": 8})
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    wait_until(lambda: sum(app.counted("shoal:aborts_total")) == before + 1)
    with socket.create_connection((request.url.host, request.url.port or 80)) as client:
        client.sendall(f"POST {request.url.path} HTTP/1.1\r\n{head}\r\n".encode() + request.content)
        wait_until(lambda: sum(app.counted("shoal:num_requests_running")) > 0)
    wait_until(lambda: sum(app.counted("shoal:aborts_total")) == before + 2)
    wait_until(lambda: not any(state.in_flight for state in app.states()))


def test_a_killed_replica_loses_its_own_requests_alone(address: str, tiny_path: Path) -> None:
    with deployed(address, tiny_path, "killed", replicas=2) as app:
        _kill_one(app)


def _kill_one(app: App) -> None:
    body: dict[str, Any] = {"prompt": "A net", "max_tokens": LONG, "ignore_eos": True, "seed": 1}
    with ThreadPoolExecutor(16) as pool:
        streams = [pool.submit(_streamed, app, body | {"cache_salt": str(salt)}) for salt in range(8)]
        whole = [pool.submit(app.complete, **body | {"cache_salt": str(salt)}) for salt in range(8)]
        wait_until(lambda: all(state.in_flight > 2 for state in app.states()))
        busy = {state.name: state.in_flight for state in app.states()}
        processes("ray::ServeReplica:killed:Replica")[0].kill()
        ends = [stream.result(PATIENCE) for stream in streams]
        answers = [answer.result(PATIENCE) for answer in whole]
    lost = [end for end in ends if end.startswith('{"error"')] + [one for one in answers if one.status_code == 503]
    assert 0 < len(lost) <= max(busy.values())
    assert all(end.startswith('{"error"') or end == "[DONE]" for end in ends)
    texts = {one.json()["choices"][0]["text"] for one in answers if one.status_code == 200}
    assert len(texts) == 1
    assert all(one.status_code in (200, 503) for one in answers)
    assert [app.complete("A net", cache_salt=str(salt)).status_code for salt in range(8)] == [200] * 8


def _streamed(app: App, body: dict[str, Any]) -> str:
    """The last event."""
    with app.http.stream("POST", "/v1/completions", json={"model": "tiny", "stream": True} | body) as stream:
        return [line for line in stream.iter_lines() if line][-1].removeprefix("data: ")


def test_an_application_that_ends_lets_requests_end(address: str, tiny_path: Path) -> None:
    body = {"model": "tiny", "prompt": "A net", "max_tokens": LONG, "ignore_eos": True}
    with (
        deployed(address, tiny_path, "ending", replicas=1, drain_timeout=PATIENCE) as app,
        ThreadPoolExecutor(8) as pool,
    ):
        streams = [pool.submit(_streamed, app, body | {"seed": seed}) for seed in range(8)]
        wait_until(lambda: app.states()[0].in_flight == len(streams))
        serve.delete("ending")
        assert [stream.result(PATIENCE) for stream in streams] == ["[DONE]"] * 8


def test_the_example_is_an_application() -> None:
    example = Path(__file__).resolve().parents[2] / "examples" / "ray_serve.py"
    assert isinstance(runpy.run_path(str(example))["app"], serve.Application)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("replicas", {"replicas": 0}),
        ("replicas", {"replicas": 2, "autoscaling_config": {"max_replicas": 2}}),
        ("min_replicas", {"autoscaling_config": {"min_replicas": 0, "max_replicas": 2}}),
        ("ingress_replicas", {"ingress_replicas": 0}),
        ("spill_above", {"spill_above": 0}),
        ("prefix_bytes", {"prefix_bytes": -1}),
        ("max_num_seqs", {"max_num_seqs": 0}),
        ("max_waiting", {"max_waiting": -1}),
        ("drain_timeout", {"drain_timeout": 0}),
        ("api_key", {"api_keys": "a b"}),
        ("max_num_seq", {"max_num_seq": 8}),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(field: str, options: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=f"^{field}:"):
        serve_app("tiny.gguf", **options)


def test_a_secret_that_can_be_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_SERVE_SECRET", "short")
    with pytest.raises(ParameterError, match=r"^SHOAL_SERVE_SECRET:"):
        serve_app("tiny.gguf")
