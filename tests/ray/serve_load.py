"""What the application of Ray Serve costs and keeps, measured: ``python -m tests.ray.serve_load [MODEL] [--only latency|prefixes]``.

latency   p50 of the time to a whole answer, and to the first and the last token of a stream, through Ray Serve and from ``shoal serve``
          itself, asked in turn
prefixes  share of prompt tokens found in the prefix cache, with one replica and with two, on 50 shared prompts in random order

Run it on a machine that does nothing else. Without MODEL it takes a tiny one with random weights.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from tests.support.tiny_model import write_tiny_model

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
PROMPTS, EACH, AT_ONCE = 50, 20, 8
ENGINE = {"max_num_seqs": 64, "max_model_len": 1024, "threads": 1}
TOKENS = 16


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", nargs="?")
    options.add_argument("--only", choices=("latency", "prefixes"))
    options.add_argument("--requests", type=int, default=100)
    given = options.parse_args()
    warnings.simplefilter("ignore")
    from tests.ray.local import local_serve

    with TemporaryDirectory() as folder, local_serve() as address:
        model = given.model or str(write_tiny_model(Path(folder) / "tiny.gguf", context=1024))
        if given.only != "prefixes":
            latency(model, address, given.requests)
        if given.only != "latency":
            prefixes(model, address)


def latency(model: str, address: str, requests: int) -> None:
    """Print the medians of both ways, and their difference, in milliseconds."""
    with deployed(model, address, 1), plain_server(model) as plain, httpx.Client(timeout=None) as client:
        ways = {"shoal serve": plain, "Ray Serve": address}
        times: dict[str, list[tuple[float, ...]]] = {name: [] for name in ways}
        for number in range(requests + 10):
            for name, url in ways.items():
                prompt = f"{number} {name}: nets, boats and fish"
                took = (answered(client, url, f"Whole {prompt}"), *streamed(client, url, prompt))
                if number >= 10:
                    times[name].append(took)
    for which, what in enumerate(("a whole answer", "the first token", "the last token")):
        found = {name: 1e3 * statistics.median(took[which] for took in all_took) for name, all_took in times.items()}
        told = ", ".join(f"{name} {median:.1f} ms" for name, median in found.items())
        print(f"p50 to {what}: {told}; added {found['Ray Serve'] - found['shoal serve']:.1f} ms", flush=True)


def prefixes(model: str, address: str) -> None:
    """Print the shares, and how far that of two replicas is below that of one."""
    shares = {}
    for replicas in (1, 2):
        with deployed(model, address, replicas):
            shares[replicas] = hits(address)
        print(f"{replicas} replicas: {shares[replicas]:.2%} of prompt tokens from the prefix cache", flush=True)
    print(f"two replicas find {1 - shares[2] / shares[1]:.2%} less than one")


def hits(address: str) -> float:
    """The share after all requests."""
    rng = random.Random(1)
    bodies = [f"{number} is where a story about nets begins. " * 15 for number in range(PROMPTS)]
    asked = [body + f"Question {number}: why?" for body in bodies for number in range(EACH)]
    rng.shuffle(asked)
    with httpx.Client(timeout=None) as client, ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda prompt: completion(client, address, prompt, 4).raise_for_status(), asked))
        text = client.get(f"{address}/metrics").text
    found, looked_for = (metric(text, f"shoal:prefix_cache_{name}_total") for name in ("hits", "queries"))
    return found / looked_for


def metric(text: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(f"{name}{{"))


def completion(client: httpx.Client, url: str, prompt: str, tokens: int) -> httpx.Response:
    return client.post(f"{url}/v1/completions", json=body_of(prompt, tokens))


def answered(client: httpx.Client, url: str, prompt: str) -> float:
    """Seconds to a whole answer."""
    began = time.perf_counter()
    completion(client, url, prompt, TOKENS).raise_for_status()
    return time.perf_counter() - began


def streamed(client: httpx.Client, url: str, prompt: str) -> tuple[float, float]:
    """Seconds to the first token, and to the end."""
    began, first = time.perf_counter(), 0.0
    with client.stream("POST", f"{url}/v1/completions", json=body_of(prompt, TOKENS) | {"stream": True}) as stream:
        for line in stream.iter_lines():
            first = first or (time.perf_counter() if line else 0.0)
    return first - began, time.perf_counter() - began


def body_of(prompt: str, tokens: int) -> dict[str, Any]:
    return {"model": "measured", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "seed": 1}


@contextmanager
def deployed(model: str, address: str, replicas: int) -> Iterator[None]:
    from ray import serve

    from shoal.ray import serve_app

    serve.run(serve_app(model, replicas=replicas, served_model_name="measured", **ENGINE))  # type: ignore[arg-type]
    wait_for(address)
    yield
    serve.delete("default")


@contextmanager
def plain_server(model: str) -> Iterator[str]:
    from tests.ray.local import free_port

    port = free_port()
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items()]
    command = [sys.executable, "-m", "shoal", "serve", model, f"--port={port}", "--served-model-name=measured", *flags]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def wait_for(url: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise TimeoutError(url)


if __name__ == "__main__":
    main()
