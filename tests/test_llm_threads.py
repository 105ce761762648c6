"""One LLM and many threads: everybody gets what they would get alone; nothing hangs, nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.engine.engine import Output
from shoal.errors import EngineError, RequestError
from shoal.llm import LLM
from shoal.params import SamplingParams
from shoal.requests.outputs import RequestOutput
from tests.support.tiny_model import write_tiny_model

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
SECONDS = 120  # a thread that takes longer hangs


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", fmt="Q4_0")


@pytest.fixture
def llm(path: Path) -> Iterator[LLM]:
    with LLM(path, device="reference", max_num_seqs=4, max_num_batched_tokens=16) as opened:
        yield opened


def prompts(who: int) -> list[str]:
    return [f"{who} and {number} is" for number in range(3)]


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def generated(llm: LLM, who: int) -> list[str]:
    return texts(llm.generate(prompts(who), GREEDY, use_tqdm=False))


def generated_from_iterator(llm: LLM, who: int) -> list[str]:
    return texts(list(llm.generate(iter(prompts(who)), GREEDY, use_tqdm=False)))


def streamed(llm: LLM, who: int) -> list[str]:
    last: dict[str, RequestOutput] = {}
    for output in llm.stream(prompts(who), GREEDY):
        grown = output.outputs[0]
        before = last.get(output.request_id)
        assert before is None or grown.text.startswith(before.outputs[0].text)
        last[output.request_id] = output
    return texts([last[request_id] for request_id in sorted(last, key=int)])


WAYS: list[Callable[[LLM, int], list[str]]] = [generated, generated_from_iterator, streamed]


def in_threads(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(SECONDS) for future in [pool.submit(call) for call in calls]]


def test_threads_get_what_they_get_alone(llm: LLM) -> None:
    expected = [generated(llm, who) for who in range(6)]
    ids = [llm.encode(prompt) for prompt in prompts(0)]
    logits = llm.logits(ids)
    calls = [partial(WAYS[who % 3], llm, who) for who in range(6)]
    *found, scored = in_threads([*calls, partial(llm.logits, ids)])
    assert found == expected
    assert all(np.array_equal(a, b) for a, b in zip(scored, logits, strict=True))
    stats = llm.engine.stats()
    assert (stats.running, stats.waiting, llm.has_work) == (0, 0, False)


def test_one_thread_changes_the_size_under_the_others(llm: LLM) -> None:
    expected = [generated(llm, who) for who in range(4)]

    def resize() -> None:
        for number in range(20):
            llm.resize(max_num_seqs=1 + number % 5, kv_cache_memory=f"{64 + number % 3}KiB")

    *found, _ = in_threads([*(partial(WAYS[who % 3], llm, who) for who in range(4)), resize])
    assert found == expected
    assert llm.config.max_num_seqs == 5


def test_threads_share_the_steps(llm: LLM) -> None:
    """Requests of several threads are in one batch: all together take little more steps than the longest alone."""
    generated(llm, 0)
    alone = llm.engine.stats().steps
    ready = threading.Barrier(4)

    def ask(who: int) -> list[str]:
        ready.wait(SECONDS)
        return texts(llm.generate([f"{who} is"], ENDLESS, use_tqdm=False))

    in_threads([partial(ask, who) for who in range(4)])
    taken = llm.engine.stats().steps - alone
    assert 200 <= taken < 2 * 200


def test_asyncio_executors(llm: LLM) -> None:
    expected = [generated(llm, who) for who in range(4)]

    async def ask_all() -> list[list[str]]:
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(None, generated, llm, who) for who in range(4)))

    assert asyncio.run(ask_all()) == expected


def test_one_thread_submits_and_another_steps(llm: LLM) -> None:
    expected = generated(llm, 0)
    ids = in_threads([partial(llm.submit, prompt, GREEDY) for prompt in prompts(0)])
    ended: dict[str, str] = {}
    while llm.has_work:
        ended |= {output.request_id: output.outputs[0].text for output in llm.step() if output.finished}
    assert [ended[request_id] for request_id in ids] == expected


def test_an_error_of_one_thread_is_not_anothers(llm: LLM) -> None:
    expected = generated(llm, 1)

    def broken() -> Iterator[str]:
        yield "one"
        raise OSError("the prompts have ended early")

    def ask() -> str:
        with pytest.raises(OSError, match="ended early"):
            list(llm.generate(broken(), GREEDY, use_tqdm=False))
        return "refused"

    assert in_threads([ask, partial(generated, llm, 1)]) == ["refused", expected]


def step_that_waits(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Make every step of the engine say that it has begun and wait until it may go on."""
    begun, go_on, step = threading.Event(), threading.Event(), llm.engine.step

    def waiting() -> list[Output]:
        begun.set()
        assert go_on.wait(SECONDS)
        return step()

    monkeypatch.setattr(llm.engine, "step", waiting)
    return begun, go_on


def test_closing_ends_what_others_wait_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(path, device="reference", max_num_seqs=4)
    ids = [llm.encode("some text to score")] * 2
    begun, go_on = step_that_waits(llm, monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        whole = pool.submit(llm.generate, ["a", "b"], ENDLESS, False)
        parts = pool.submit(lambda: list(llm.stream(["a"], ENDLESS)))
        assert begun.wait(SECONDS)
        scored = pool.submit(llm.logits, ids)
        closed = pool.submit(llm.close)
        go_on.set()
        for future in (whole, parts):
            late = future.exception(SECONDS)  # its prompts, or the second of them, had not come in yet
            if late is None:
                assert future.result()[-1].outputs[0].finish_reason in ("abort", "error")
            else:
                assert isinstance(late, EngineError)
                assert "closed" in str(late)
        assert closed.result(SECONDS) is None
        with pytest.raises((RequestError, EngineError), match=r"aborted|closed"):
            scored.result(SECONDS)
    with pytest.raises(EngineError, match="closed"):
        llm.generate("a", GREEDY)


def test_aborting_from_inside_a_step_waits_for_its_end(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a forgotten stream is collected, or a signal handler aborts, while a step runs."""
    step, forgotten = llm.engine.step, llm.stream(["a"], ENDLESS)
    next(forgotten)
    kept = llm.submit("hello", GREEDY)
    expected = texts([llm.generate("hello", GREEDY)[0]])[0]

    def collecting() -> list[Output]:
        forgotten.close()  # type: ignore[attr-defined]
        with pytest.raises(EngineError, match="from inside one of its own calls"):
            llm.submit("hello", GREEDY)
        return step()

    monkeypatch.setattr(llm.engine, "step", collecting)
    ended: list[RequestOutput] = []
    while llm.has_work:
        ended += [output for output in llm.step() if output.finished]
    assert [(output.request_id, output.outputs[0].text) for output in ended] == [(kept, expected)]
    stats = llm.engine.stats()
    assert (stats.running, stats.waiting, stats.free_pages) == (0, 0, stats.num_pages)


def workers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("shoal-worker")}


def test_one_that_is_dropped_leaves_no_threads(path: Path) -> None:
    before = workers()
    llm = LLM(path, device="cpu", threads=3, max_num_seqs=2, max_model_len=64)
    llm.generate("hello", GREEDY, use_tqdm=False)
    own = workers() - before
    assert len(own) == 2
    del llm
    gc.collect()
    for thread in own:
        thread.join(SECONDS)
        assert not thread.is_alive()


FORK = """
import os, sys, threading, warnings
warnings.simplefilter("ignore")  # from Python 3.12 on: a fork beside other threads
from shoal import LLM, SamplingParams
greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
llm = LLM(sys.argv[1], device=sys.argv[2], threads=2, max_num_seqs=2, max_model_len=64, chat_template="{{ messages[0].content }}")
def text():
    chat = llm.chat([{"role": "user", "content": "hello"}], greedy, use_tqdm=False)[0]
    return llm.generate("hello", greedy, use_tqdm=False)[0].outputs[0].text, chat.outputs[0].text
expected = text()
if sys.argv[3] == "inside":
    begun, go_on, step = threading.Event(), threading.Event(), llm.engine.step
    def waiting():
        begun.set()
        go_on.wait(60)
        return step()
    llm.engine.step = waiting
    other = threading.Thread(target=text)
    other.start()
    begun.wait(60)
child = os.fork()
if child == 0:
    code = 1
    try:
        workers = [thread for thread in threading.enumerate() if thread.name.startswith("shoal-worker")]
        code = 0 if text() == expected and not workers else 2
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        code = 3
    finally:
        os._exit(code)
_, status = os.waitpid(child, 0)
if sys.argv[3] == "inside":
    go_on.set()
    other.join(60)
assert text() == expected
sys.exit(os.waitstatus_to_exitcode(status))
"""


def forked(path: Path, device: str, when: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", FORK, str(path), device, when]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_forked_process_goes_on_with_its_copy(path: Path, device: str) -> None:
    done = forked(path, device, "idle")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_while_another_thread_is_inside_is_refused_in_the_child(path: Path) -> None:
    done = forked(path, "reference", "inside")
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith("EngineError: another thread was using this LLM when the process forked")
