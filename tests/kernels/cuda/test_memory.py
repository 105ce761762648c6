"""A GPU that is too small is an error that says for what, how much was asked for and is free, and what helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.errors import MemoryLimitError
from shoal.kernels.cuda import backend, cache, memory
from shoal.kernels.cuda.memory import placing
from shoal.llm import LLM
from tests.support.tiny_model import write_tiny_model

FULL = (
    "CUDA out of memory. Tried to allocate 20.50 MiB. GPU 0 has a total capacity of 79.10 GiB of which 1.2 MiB is free."
)


def fail(*arguments: Any, **more: Any) -> None:
    raise torch.OutOfMemoryError(FULL)


@pytest.mark.parametrize(
    ("module", "allocation", "says"),
    [
        (backend, "pack_matrix", r"the weights token_embd\.weight \(20\.50 MiB asked for, 7 bytes free\)"),
        (cache, "_group_pages", r"the KV pages \(\d+ bytes asked for, 7 bytes free\)"),
        (backend, "StepMemory", r"what steps compute in, .* \(20\.50 MiB asked for, 7 bytes free\)"),
        (backend, "Sampler", r"what steps compute in, .* \(20\.50 MiB asked for, 7 bytes free\)"),
    ],
)
def test_at_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: Any, allocation: str, says: str) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", layers=1)
    monkeypatch.setattr(memory, "free_bytes", lambda: 7)
    monkeypatch.setattr(module, allocation, fail)
    with pytest.raises(MemoryLimitError, match=f"^GPU memory: no room for {says}; .*--gpu-layers N.*--max-model-len"):
        LLM(path, device="cuda", max_model_len=64)


def test_a_drivers_words_count_too() -> None:
    with pytest.raises(MemoryLimitError, match=r"^GPU memory: no room for graphs; give the GPU"), placing("graphs"):
        raise RuntimeError("Triton Error [CUDA]: out of memory")


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="an illegal memory access"), placing("graphs"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
