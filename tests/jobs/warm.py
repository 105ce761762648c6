"""Imported by the process that jobs are forked from: it has loaded the kernels of their model, and they need not."""

from __future__ import annotations

import tempfile
from pathlib import Path

from shoal.llm import LLM
from shoal.params import SamplingParams
from tests.support.tiny_model import write_tiny_model

with tempfile.TemporaryDirectory() as name:
    model = write_tiny_model(Path(name) / "tiny.gguf")
    with LLM(model, device="cpu", threads=1) as llm:  # closed before the first fork: no thread is lost in one
        llm.generate("x", SamplingParams(max_tokens=2), use_tqdm=False)
