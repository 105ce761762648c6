"""Architectures without a file among the shared golden data: tiny models made here, against what llama.cpp computed for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shoal.llm import LLM
from tests.conformance.test_archs import nmse
from tests.support.tiny_archs import DEEP, TINY_ARCHS, digest, tokens

FOLDER = Path(__file__).parent / "archs"
CASES = [(name, kv) for name, tiny in TINY_ARCHS.items() for kv in ("f32", "f16") if kv == "f32" or tiny.layers < DEEP]


def tolerance(name: str, kv: str) -> float:
    """That of the shared golden data. llama.cpp looks GELU up in a table of float16 values."""
    if kv == "f16":
        return 2e-5
    usual, deep = (1e-6, 1e-4) if TINY_ARCHS[name].gelu else (1e-9, 1e-8)
    return usual if TINY_ARCHS[name].layers < DEEP else deep


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize(("name", "kv"), CASES)
def test_logits(tmp_path: Path, name: str, kv: str, device: str) -> None:
    """As one batch beside another sequence, and in chunks of 7."""
    path, ids = TINY_ARCHS[name].write(tmp_path / "tiny.gguf"), tokens()
    with np.load(FOLDER / f"{name}.npz") as file:
        expected, known_as = file["logits"], str(file["digest"])
    assert digest(path) == known_as, "made otherwise than when the logits were recorded: run record_archs.py"
    for rows in (64, 7):
        with LLM(
            path,
            device=device,
            kv_cache_dtype=kv,
            max_model_len=32,
            max_num_seqs=2,
            max_num_batched_tokens=rows,
            skip_tokenizer_init=True,
        ) as llm:
            logits = llm.logits([ids[5:], ids])[1]
        assert nmse(logits, expected) <= tolerance(name, kv)


def test_every_recorded_model_is_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.npz")} == set(TINY_ARCHS)
