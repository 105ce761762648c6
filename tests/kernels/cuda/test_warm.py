"""What is launched at load: all that is launched later, and nothing that anybody sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import shoal
from shoal.kernels.cuda import warm
from shoal.kernels.cuda.recording import Call
from shoal.llm import LLM
from shoal.params import SamplingParams
from tests.support.tiny_model import write_tiny_model

SOURCE = Path(shoal.__file__).parent.parent


def launched_later(what: str) -> dict[str, tuple[int, list[str]]]:
    """For each thing that was loaded how many kernels that launched, and those that were launched first in use."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.cuda.warm_keys", what],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(SOURCE)},
    )
    return {name: (known, new) for name, known, new in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("what", ["models", "experts"])
def test_nothing_is_compiled_after_load(what: str) -> None:
    found = launched_later(what)
    assert len(found) >= 4
    assert {name: new for name, (_, new) in found.items() if new} == {}
    assert all(known >= 18 for known, _ in found.values())


def test_without_chunks_at_load_some_are() -> None:
    ((_, new),) = launched_later("nothing").values()
    assert any(kernel.startswith("attention._walk") for kernel in new)
    assert any(kernel.startswith("linear.") for kernel in new)


def test_sizes_of_chunks() -> None:
    none: list[Call] = []
    assert warm.chunk_sizes(none, 2048) == [2, 4, 8, 16, 32, 64, 130]
    assert warm.chunk_sizes(none, 50) == [2, 4, 8, 16, 32, 50]
    assert warm.chunk_sizes(none, 1) == [1]


def test_it_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = warm.samples
    monkeypatch.setattr(warm, "samples", lambda vocab: islice(every(vocab), 2))
    path = write_tiny_model(tmp_path / "tiny.gguf", layers=1)
    params = SamplingParams(seed=1, max_tokens=4, ignore_eos=True)
    tokens = []
    for warmed in (False, True):
        with LLM(path, device="cuda", max_model_len=64, max_num_seqs=2, max_num_batched_tokens=8) as llm:
            assert llm.engine._compute is not None
            runner, network = llm.engine._compute[0], vars(llm.engine._compute[0])["network"]
            if warmed:
                before = pages_in_use(runner._cache)
                network.warm_up()
                assert all(map(torch.equal, before, pages_in_use(runner._cache)))
            tokens.append(llm.generate("some words", params, use_tqdm=False)[0].outputs[0].token_ids)
    assert tokens[0] == tokens[1]


def pages_in_use(cache: Any) -> list[torch.Tensor]:
    """All but the scratch pages."""
    return [tensor[:, :-1].clone() for pages in cache.groups for tensor in pages.tensors]
