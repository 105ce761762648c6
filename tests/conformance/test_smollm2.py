"""SmolLM2 (Q4_1) against llama.cpp's golden data, within the tolerances that the data's READMEs prescribe.

``exact`` there is float arithmetic on the file's weights, ``f16`` llama.cpp's own 8-bit arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.bench.perplexity import Score, score_text
from shoal.llm import LLM
from shoal.params import SamplingParams

FLOAT_PROMPTS = ("short-capital", "chat-simple", "unicode-list")  # the slow backend is held to these

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Forced:
    """A golden record, and our logits [steps, vocab] where its own ``gen_ids`` were fed one after the other."""

    record: dict[str, Any]
    logits: F32

    @property
    def chosen(self) -> list[int]:
        return [int(token) for token in self.logits.argmax(axis=1)]


@pytest.fixture(scope="module")
def cpu(smollm2_path: Path, golden: Path) -> Iterator[LLM]:
    with LLM(smollm2_path, device="cpu", max_model_len=1024, max_num_seqs=8) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(smollm2_path: Path, golden: Path) -> Iterator[LLM]:
    with LLM(smollm2_path, device="reference", max_model_len=1024, max_num_seqs=8) as llm:
        yield llm


def records(golden: Path, variant: str) -> dict[str, dict[str, Any]]:
    lines = (golden / "models/smollm2.greedy.jsonl").read_text().splitlines()
    return {record["id"]: record for record in map(json.loads, lines) if record["variant"] == variant}


def forced(llm: LLM, record: dict[str, Any]) -> Forced:
    prompt, generated = record["prompt_ids"], record["gen_ids"]
    return Forced(record, llm.logits(prompt + generated[:-1])[len(prompt) - 1 :].copy())


@pytest.fixture(scope="module")
def forced_f16(cpu: LLM, golden: Path) -> list[Forced]:
    return [forced(cpu, record) for record in records(golden, "f16").values()]


@pytest.fixture(scope="module")
def forced_exact(reference: LLM, golden: Path) -> list[Forced]:
    exact = records(golden, "exact")
    return [forced(reference, exact[name]) for name in FLOAT_PROMPTS]


@pytest.fixture(scope="module")
def golden_logits(golden: Path) -> dict[str, F32]:
    with np.load(golden / "models/smollm2.logits.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def golden_nll(golden: Path) -> dict[str, NDArray[Any]]:
    with np.load(golden / "perplexity/perplexity.nll.npz") as file:
        return {name: file[name] for name in file if name.startswith("smollm2")}


@pytest.fixture(scope="module")
def text(golden: Path) -> str:
    return (golden / "perplexity/text.txt").read_text(encoding="ascii")


@pytest.fixture(scope="module")
def cpu_score(cpu: LLM, text: str) -> Score:
    return score_text(cpu, text)


def nmse(a: F32, r: F32) -> float:
    a64, r64 = a.astype(np.float64), r.astype(np.float64)
    return float(((a64 - r64) ** 2).sum() / (r64**2).sum())


def kld(a: F32, r: F32) -> float:
    log_a, log_r = log_softmax(a), log_softmax(r)
    return float((np.exp(log_r) * (log_r - log_a)).sum())


def log_softmax(x: F32) -> F64:
    shifted = x.astype(np.float64) - x.max()
    result: F64 = shifted - np.log(np.exp(shifted).sum())
    return result


def scored(nll: NDArray[Any]) -> F64:
    """Columns 256 to 510 of the golden [5, 511]: the second half of each chunk."""
    return nll[:, 256:].astype(np.float64)


def test_last_logits_are_near_float_arithmetic(forced_f16: list[Forced], golden_logits: dict[str, F32]) -> None:
    ours = {item.record["id"]: item.logits[0] for item in forced_f16}
    errors = [nmse(ours[name], golden_logits[f"{name}/exact"]) for name in ours]
    divergences = [kld(ours[name], golden_logits[f"{name}/exact"]) for name in ours]
    assert len(errors) == 8
    assert max(errors) <= 3e-2
    assert np.mean(errors) <= 5e-3
    assert max(divergences) <= 0.06
    assert np.mean(divergences) <= 0.02


def test_logits_are_as_near_to_float_arithmetic_as_llama_cpps(
    forced_f16: list[Forced], golden_logits: dict[str, F32]
) -> None:
    ours, theirs = [], []
    for item in forced_f16:
        exact = golden_logits[f"{item.record['id']}/exact"]
        ours.append(nmse(item.logits[0], exact))
        theirs.append(nmse(golden_logits[f"{item.record['id']}/f16"], exact))
    assert np.exp(np.mean(np.log(ours))) <= 1.2 * np.exp(np.mean(np.log(theirs)))


def test_teacher_forced_greedy_steps_agree(forced_f16: list[Forced]) -> None:
    agree = []
    for item in forced_f16:
        for step, chosen, expected in zip(item.record["steps"], item.chosen, item.record["gen_ids"], strict=True):
            agree.append(chosen == expected)
            assert chosen == expected or step["min_gap"] < 1.0, item.record["id"]
    assert len(agree) == 8 * 48
    assert np.mean(agree) >= 0.9


def test_generated_tokens_are_the_best_of_the_logits(cpu: LLM, golden: Path) -> None:
    """One token at a time through the KV cache gives what one pass over the whole text gives, bit for bit."""
    prompts = [record["prompt_ids"] for record in records(golden, "f16").values()]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    for output in cpu.generate([{"prompt_token_ids": ids} for ids in prompts], params):
        answer = output.outputs[0].token_ids
        logits = cpu.logits(output.prompt_token_ids + answer[:-1])
        assert logits[len(output.prompt_token_ids) - 1 :].argmax(axis=1).tolist() == answer


def test_perplexity_is_that_of_llama_cpp(cpu_score: Score, golden_nll: dict[str, NDArray[Any]]) -> None:
    exact, theirs = scored(golden_nll["smollm2-q4_1-exact"]), scored(golden_nll["smollm2-q4_1"])
    assert cpu_score.nll.size == 1275
    for nll in (exact, theirs):
        assert cpu_score.ppl == pytest.approx(np.exp(nll.mean()), rel=0.015)
    assert np.corrcoef(cpu_score.nll.ravel(), exact.ravel())[0, 1] >= 0.995
    assert np.abs(cpu_score.nll - exact).max() <= 1.5


def test_predictions_are_as_near_to_float_arithmetic_as_llama_cpps(
    cpu_score: Score, golden_nll: dict[str, NDArray[Any]]
) -> None:
    """llama.cpp's own distance is 0.078 to 0.080."""
    exact = scored(golden_nll["smollm2-q4_1-exact"])
    assert np.sqrt(((cpu_score.nll - exact) ** 2).mean()) <= 0.084


def test_int8_pages_lose_little(smollm2_path: Path, text: str, golden_nll: dict[str, NDArray[Any]]) -> None:
    """The limit is that of f16 pages."""
    exact = scored(golden_nll["smollm2-q4_1-exact"])
    with LLM(smollm2_path, device="cpu", max_model_len=1024, max_num_seqs=8, kv_cache_dtype="q8_0") as llm:
        score = score_text(llm, text)
    assert np.sqrt(((score.nll - exact) ** 2).mean()) <= 0.084
    assert score.ppl == pytest.approx(np.exp(exact.mean()), rel=0.015)


def test_perplexity_tokens(cpu: LLM, text: str, golden_nll: dict[str, NDArray[Any]]) -> None:
    assert cpu.encode({"prompt_token_ids": golden_nll["smollm2.tokens"]}) == golden_nll["smollm2.tokens"].tolist()
    assert cpu.tokenizer is not None
    assert cpu.tokenizer.encode(text)[: golden_nll["smollm2.tokens"].size] == golden_nll["smollm2.tokens"].tolist()


def test_prompts_have_llama_cpps_tokens(cpu: LLM, golden: Path) -> None:
    for record in records(golden, "f16").values():
        if not record["parse_special"]:
            assert cpu.encode(record["prompt"]) == record["prompt_ids"]
        elif "messages" in record:
            assert cpu.encode({"messages": record["messages"]}) == record["prompt_ids"]


def test_reference_logits_are_float_arithmetic(forced_exact: list[Forced], golden_logits: dict[str, F32]) -> None:
    for item in forced_exact:
        exact = golden_logits[f"{item.record['id']}/exact"]
        assert nmse(item.logits[0], exact) <= 1e-5
        assert kld(item.logits[0], exact) <= 1e-5
        assert np.abs(item.logits[0] - exact).max() <= 0.05


def test_reference_takes_the_exact_greedy_steps(forced_exact: list[Forced]) -> None:
    for item in forced_exact:
        gaps = [step["gap"] for step in item.record["steps"]]
        sure = next((i for i, gap in enumerate(gaps) if gap < 0.1), len(gaps))
        assert sure > 0
        assert item.chosen[:sure] == item.record["gen_ids"][:sure]


def test_reference_perplexity_is_exact(reference: LLM, text: str, golden_nll: dict[str, NDArray[Any]]) -> None:
    score = score_text(reference, text[:6000])  # two chunks and a rest: the slow backend takes half a minute for each
    exact = scored(golden_nll["smollm2-q4_1-exact"])[: len(score.nll)]
    assert score.nll.size == 2 * 255
    assert score.nll.mean() == pytest.approx(exact.mean(), abs=5e-4)
    assert np.abs(score.nll - exact).max() <= 0.05
