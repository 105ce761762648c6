"""One device in a process, whichever thread calls; a process that was forked from one that uses it is told so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import shoal
from shoal.errors import UnsupportedError
from shoal.kernels.cuda import launch
from tests.support.tiny_model import write_tiny_model

SOURCE = Path(shoal.__file__).parent.parent
FORKING = """
import os, sys, warnings
warnings.simplefilter("ignore")
from shoal.errors import ShoalError
from shoal.llm import LLM
from shoal.params import SamplingParams

flags = {"device": "cuda", "max_model_len": 32, "max_num_seqs": 1, "max_num_batched_tokens": 8}
llm = LLM(sys.argv[1], **flags)
if os.fork() == 0:
    print(llm.generate("a", SamplingParams(max_tokens=1), use_tqdm=False)[0].error, flush=True)
    try:
        LLM(sys.argv[1], **flags)
    except ShoalError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    os._exit(0)
assert os.wait()[1] == 0
"""
FORKED = "device cuda: this process was forked from one that uses the GPU, which no fork can share: start it by multiprocessing's spawn"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_is_told_what_to_do(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", layers=1)
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "TRITON_INTERPRET": "1"}
    program = [sys.executable, "-c", FORKING, str(path)]
    done = subprocess.run(program, capture_output=True, text=True, check=True, env=environment)
    request, load = done.stdout.splitlines()
    assert FORKED in request
    assert load.startswith(f"UnsupportedError: {FORKED}")


class Gpus:
    """Of a machine with several, what torch says in one thread."""

    def __init__(self, current: int) -> None:
        self.current = current

    @contextmanager
    def device(self, place: torch.device) -> Iterator[None]:
        before, self.current = self.current, place.index
        yield
        self.current = before


def test_all_threads_use_the_gpu_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(current=2)
    monkeypatch.setattr(launch, "_owner", None)
    monkeypatch.setattr(launch, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: gpus.current)
    monkeypatch.setattr(torch.cuda, "device", gpus.device)
    assert launch.device() == torch.device("cuda", 2)
    gpus.current = 0  # as in a new thread
    assert launch.device() == torch.device("cuda", 2)
    assert launch.on_device(lambda: gpus.current)() == 2
    assert gpus.current == 0


def test_a_gpu_that_cannot_be_used_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.")

    monkeypatch.setattr(launch, "_owner", None)
    monkeypatch.setattr(launch, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", fail)
    with pytest.raises(UnsupportedError, match=r"^device cuda: Cannot re-initialize CUDA in forked"):
        launch.device()
