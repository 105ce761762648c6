"""SmolLM2 (Q4_1) and Gemma 3 270M (Q4_K_M) against llama.cpp's golden data, within the tolerances that the data's READMEs prescribe.

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
FLOAT_STEPS = 24
LABELS = {"smollm2": "smollm2-q4_1", "gemma3": "gemma3-q4_k_m"}

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Real:
    """A real model and its golden data."""

    name: str
    path: Path
    golden: Path

    @property
    def template(self) -> Path | None:
        """Gemma's file has none: the one its instruction-tuned sister was published with."""
        return self.golden / "models/gemma3.chat_template.jinja" if self.name == "gemma3" else None

    def load(self, device: str, **flags: Any) -> LLM:
        """The model on a device."""
        flags = {"max_model_len": 1024, "max_num_seqs": 8, "chat_template": self.template} | flags
        return LLM(self.path, device=device, **flags)

    def records(self, variant: str) -> dict[str, dict[str, Any]]:
        """Its greedy records by prompt."""
        lines = (self.golden / f"models/{self.name}.greedy.jsonl").read_text().splitlines()
        return {record["id"]: record for record in map(json.loads, lines) if record["variant"] == variant}

    def nll(self, suffix: str = "") -> NDArray[Any]:
        """-ln p of each token of the perplexity text [5, 511]: llama.cpp's, or of float arithmetic (-exact)."""
        with np.load(self.golden / "perplexity/perplexity.nll.npz") as file:
            found: NDArray[Any] = file[LABELS[self.name] + suffix]
        return found

    def text_tokens(self) -> list[int]:
        """Those of the perplexity text."""
        with np.load(self.golden / "perplexity/perplexity.nll.npz") as file:
            found: list[int] = file[f"{self.name}.tokens"].tolist()
        return found


@dataclass(frozen=True)
class Forced:
    """A golden record, and our logits [steps, vocab] where its own ``gen_ids`` were fed one after the other."""

    record: dict[str, Any]
    logits: F32

    @property
    def chosen(self) -> list[int]:
        return [int(token) for token in self.logits.argmax(axis=1)]


@pytest.fixture(scope="module", params=list(LABELS))
def real(request: pytest.FixtureRequest, golden: Path) -> Real:
    path: Path = request.getfixturevalue(f"{request.param}_path")
    return Real(request.param, path, golden)


@pytest.fixture(scope="module")
def cpu(real: Real) -> Iterator[LLM]:
    with real.load("cpu") as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(real: Real) -> Iterator[LLM]:
    with real.load("reference") as llm:
        yield llm


def forced(llm: LLM, record: dict[str, Any], steps: int | None = None) -> Forced:
    """The first ``steps``, or all."""
    prompt, generated = record["prompt_ids"], record["gen_ids"][:steps]
    return Forced(record, llm.logits(prompt + generated[:-1])[len(prompt) - 1 :].copy())


@pytest.fixture(scope="module")
def forced_f16(cpu: LLM, real: Real) -> list[Forced]:
    return [forced(cpu, record) for record in real.records("f16").values()]


@pytest.fixture(scope="module")
def forced_exact(reference: LLM, real: Real) -> list[Forced]:
    exact = real.records("exact")
    return [forced(reference, exact[name], FLOAT_STEPS) for name in FLOAT_PROMPTS]


@pytest.fixture(scope="module")
def golden_logits(real: Real) -> dict[str, F32]:
    with np.load(real.golden / f"models/{real.name}.logits.npz") as file:
        return dict(file)


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


def rms(x: NDArray[Any]) -> float:
    return float(np.sqrt((x.astype(np.float64) ** 2).mean()))


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


def test_generated_tokens_are_the_best_of_the_logits(cpu: LLM, real: Real) -> None:
    """One token at a time through the KV cache gives what one pass over the whole text gives, bit for bit."""
    prompts = [record["prompt_ids"] for record in real.records("f16").values()][::2]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    for output in cpu.generate([{"prompt_token_ids": ids} for ids in prompts], params):
        answer = output.outputs[0].token_ids
        logits = cpu.logits(output.prompt_token_ids + answer[:-1])
        assert logits[len(output.prompt_token_ids) - 1 :].argmax(axis=1).tolist() == answer


def test_perplexity_is_that_of_llama_cpp(cpu_score: Score, real: Real) -> None:
    exact, theirs = scored(real.nll("-exact")), scored(real.nll())
    assert cpu_score.nll.size == 1275
    for nll in (exact, theirs):
        assert cpu_score.ppl == pytest.approx(np.exp(nll.mean()), rel=0.015)
    assert np.corrcoef(cpu_score.nll.ravel(), exact.ravel())[0, 1] >= 0.995
    assert np.abs(cpu_score.nll - exact).max() <= 1.5


def test_predictions_are_as_near_to_float_arithmetic_as_llama_cpps(cpu_score: Score, real: Real) -> None:
    exact, theirs = scored(real.nll("-exact")), scored(real.nll())
    assert rms(cpu_score.nll - exact) <= 1.05 * rms(theirs - exact)


def test_int8_pages_lose_little(real: Real, text: str) -> None:
    """The limit is that of f16 pages; of the first two chunks."""
    exact, theirs = scored(real.nll("-exact"))[:2], scored(real.nll())[:2]
    with real.load("cpu", kv_cache_dtype="q8_0") as llm:
        score = score_text(llm, text[:5000])
    assert score.nll.shape == exact.shape
    assert rms(score.nll - exact) <= 1.05 * rms(theirs - exact)
    assert score.ppl == pytest.approx(np.exp(exact.mean()), rel=0.015)


def test_perplexity_tokens(cpu: LLM, real: Real, text: str) -> None:
    ids = real.text_tokens()
    assert cpu.encode({"prompt_token_ids": ids}) == ids
    assert cpu.tokenizer is not None
    assert cpu.tokenizer.encode(text)[: len(ids)] == ids


def test_prompts_have_llama_cpps_tokens(cpu: LLM, real: Real) -> None:
    for record in real.records("f16").values():
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
        sure = next((i for i, gap in enumerate(gaps[:FLOAT_STEPS]) if gap < 0.1), FLOAT_STEPS)
        assert sure > 0
        assert item.chosen[:sure] == item.record["gen_ids"][:sure]


def test_reference_perplexity_is_exact(reference: LLM, real: Real, text: str) -> None:
    """The first quarter of the first chunk, of whose tokens the later half is scored: the backend is slow."""
    score = score_text(reference, text[:850], ctx_size=128)
    exact = real.nll("-exact")[:1, 64:127].astype(np.float64)
    assert score.nll.shape == exact.shape
    assert score.nll.mean() == pytest.approx(exact.mean(), abs=5e-4)
    assert np.abs(score.nll - exact).max() <= 0.05
