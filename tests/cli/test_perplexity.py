"""``shoal perplexity``: the method, on a tiny model; its agreement with llama.cpp is in tests/conformance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.bench import perplexity
from shoal.bench.perplexity import score_text, token_nll
from shoal.errors import RequestError
from shoal.llm import LLM
from tests.cli.conftest import Shoal
from tests.support.tiny_model import write_tiny_model

TEXT = "the quick brown fox jumps over the lazy dog, " * 3
CTX = 32


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny.gguf")


def naive_nll(llm: LLM, ids: list[int]) -> list[float]:
    """-ln p of the tokens of the second half, one softmax after the other."""
    logits = llm.logits(ids).astype(np.float64)
    found = []
    for i in range(len(ids) // 2, len(ids) - 1):
        p = np.exp(logits[i]) / np.exp(logits[i]).sum()
        found.append(-float(np.log(p[ids[i + 1]])))
    return found


def test_the_second_half_of_each_chunk_is_scored(model: Path) -> None:
    with LLM(model, device="reference", max_num_seqs=1) as llm:
        ids = llm.encode(TEXT)
        score = score_text(llm, TEXT, CTX)
        expected = [naive_nll(llm, ids[i * CTX : (i + 1) * CTX]) for i in range(len(ids) // CTX)]
    assert score.nll.shape == (4, CTX // 2 - 1)
    np.testing.assert_allclose(score.nll, expected, rtol=1e-9)
    flat = np.ravel(expected)
    assert score.ppl == pytest.approx(np.exp(flat.mean()))
    assert score.stderr == pytest.approx(score.ppl * flat.std() / np.sqrt(flat.size - 1))


def test_a_chunk_that_does_not_fit_is_refused(model: Path) -> None:
    with (
        LLM(model, device="reference", max_num_seqs=1, max_model_len=CTX - 1) as llm,
        pytest.raises(RequestError, match="32 tokens; max_model_len 31 leaves it 31"),
    ):
        score_text(llm, TEXT, CTX)


def test_a_chunk_starts_with_bos_where_the_model_wants_one(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(model, device="reference", max_num_seqs=1) as llm:
        assert llm.tokenizer is not None
        runs: list[list[int]] = []

        def noted(llm: LLM, ids: list[int]) -> NDArray[np.float64]:
            runs.append(ids)
            return token_nll(llm, ids)

        monkeypatch.setattr(perplexity, "token_nll", noted)
        score_text(llm, TEXT, CTX)
        plain, runs = runs, []
        llm.tokenizer.bos_id, llm.tokenizer._first = 256, [256]
        score_text(llm, TEXT, CTX)
    whole = [token for run in plain for token in run]
    assert [run[0] for run in runs] == [256] * len(runs)
    shifted = [256, *whole]
    assert [run[1:] for run in runs] == [shifted[i * CTX + 1 : (i + 1) * CTX] for i in range(len(runs))]


def test_a_short_text_is_refused_with_both_numbers(model: Path) -> None:
    with (
        LLM(model, device="reference", max_num_seqs=1) as llm,
        pytest.raises(RequestError, match=r"the text has 5 tokens; one chunk of --ctx-size needs 32"),
    ):
        score_text(llm, "hello", CTX)


def test_the_command(shoal: Shoal, model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    flags = (model, "-f", "text.txt", "--ctx-size", CTX, "--device", "reference")
    done = shoal("perplexity", *map(str, flags), "--json")
    facts = json.loads(done.stdout)
    assert (facts["num_chunks"], facts["num_scored"], facts["num_tokens"]) == (4, 60, len(TEXT))
    assert done.stderr.count("PPL so far") == 4
    words = shoal("perplexity", *map(str, flags)).stdout
    assert words == f"PPL = {facts['ppl']:.4f} +/- {facts['stderr']:.5f}\n"
    refused = shoal("perplexity", *map(str, flags), "--ctx-size", "3")
    assert (refused.returncode, refused.stderr) == (2, "shoal: ctx_size: got 3, must be at least 4\n")
