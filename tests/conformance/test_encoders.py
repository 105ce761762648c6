"""Tiny encoders and decoders made here, against what llama.cpp made of their states (record_encoders.py), on both backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.llm import LLM
from shoal.params import PoolingParams
from tests.conformance.test_archs import nmse
from tests.support.tiny_archs import digest, tokens
from tests.support.tiny_encoders import EMBEDDING, RANK, TINY_ENCODERS

FOLDER = Path(__file__).parent / "encoders"
RAW = PoolingParams(normalize=False)


def tolerance(name: str) -> float:
    """That of ``test_archs``: llama.cpp looks GELU up in a table of float16 values."""
    return 1e-6 if EMBEDDING[name].gelu else 1e-9


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("name", EMBEDDING)
def test_states_and_pooling(tmp_path: Path, name: str, device: str) -> None:
    """Beside other texts, in one step with them or after them."""
    path, ids = EMBEDDING[name].write(tmp_path / "tiny.gguf"), tokens()
    with np.load(FOLDER / f"{name}.npz") as file:
        states, pooled, known_as = file["states"], file["pooled"], str(file["digest"])
    assert digest(path) == known_as, "made otherwise than when this was recorded: run record_encoders.py"
    inputs = [{"prompt_token_ids": some} for some in (ids[5:], ids, ids[:3])]

    def load(rows: int, pooling: str | None) -> LLM:
        flags: dict[str, Any] = {
            "device": device,
            "kv_cache_dtype": "f32",
            "max_num_seqs": 3,
            "skip_tokenizer_init": True,
        }
        return LLM(path, max_num_batched_tokens=rows, pooling_type=pooling, **flags)

    for rows in (64, 24):
        with load(rows, "none") as llm:
            found = llm.embed(inputs, pooling_params=RAW)[1].outputs.embedding
        assert nmse(np.array(found), states) <= tolerance(name)
    if pooled.shape != (1,):
        with load(64, None) as llm:
            found = llm.embed(inputs, pooling_params=RAW)[1].outputs.embedding
        assert nmse(np.array(found), pooled) <= tolerance(name)


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("name", [name for name, tiny in TINY_ENCODERS.items() if tiny.pooling == RANK])
def test_scores(tmp_path: Path, name: str, device: str) -> None:
    """Of the recorded ids, which no pair of texts becomes: what ``score`` asks of the engine, without a tokenizer."""
    from shoal.engine.engine import Request
    from shoal.params import SamplingParams
    from shoal.requests.pooled import Pooled

    path, ids = TINY_ENCODERS[name].write(tmp_path / "tiny.gguf"), tokens()
    with np.load(FOLDER / f"{name}.npz") as file:
        expected = file["pooled"]
    with LLM(path, device=device, skip_tokenizer_init=True) as llm:
        item = Pooled("pair", ids, "rank", PoolingParams(use_activation=False), [])
        llm.engine.add(Request("pair", tuple(ids), SamplingParams(), pooling="rank"))
        while llm.engine.has_work:
            for output in llm.engine.step():
                item.take(output)
    assert nmse(np.array([item.score()]), expected) <= 10 * tolerance(name)  # one number, not the mean of many


def test_every_recorded_encoder_is_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.npz")} == set(EMBEDDING)
