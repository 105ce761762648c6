"""Models cut in two, another backend in the place of a GPU. What crosses is exact, so that two halves give the bits of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.errors import ParameterError
from shoal.gguf.reader import GGUFFile
from shoal.llm import LLM
from shoal.models.config import ModelConfig
from shoal.params import SamplingParams
from tests.conformance.test_archs import GELU, SILU, golden_logits, nmse, tolerance
from tests.conformance.test_batch_invariance import generate, mixed_requests, write_mixed_model
from tests.support.no_gpu import SlowGPU, as_gpu, small_cpu
from tests.support.tiny_archs import TINY_ARCHS, tokens
from tests.support.tiny_encoders import TINY_ENCODERS
from tests.support.tiny_model import write_tiny_model

FEW = ("olmo", "granitemoe", "exaone4_32b", "olmo3", "codeshell", "phi3_separate", "deepseek2_unsplit", "bailingmoe2")
FLAGS: dict[str, Any] = {"kv_cache_dtype": "f32", "max_model_len": 64, "skip_tokenizer_init": True}


def num_layers(path: Path) -> int:
    with GGUFFile.open(path) as file:
        return ModelConfig.from_gguf(file).n_layers


def ways(path: Path, ids: list[int], **flags: Any) -> list[NDArray[np.float32]]:
    """Logits of all positions: beside others, and in chunks of 7 that two sequences share."""
    found = []
    for rows in (64, 7):
        with LLM(path, **{**FLAGS, "max_num_seqs": 3, "max_num_batched_tokens": rows, **flags}) as llm:
            found.append(llm.logits([ids[3:9], ids, ids[:1]])[1])
    return found


def check_halves(path: Path, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """All cuts through a model on the CPU give the bits of the whole."""
    whole = ways(path, ids, device="cpu", threads=1)[0]
    as_gpu(monkeypatch, small_cpu)
    layers = num_layers(path)
    for count in sorted({1, 2, (layers + 1) // 2, layers}):
        for logits in ways(path, ids, device="cuda", threads=1, gpu_layers=count):
            assert np.array_equal(logits, whole)


@pytest.mark.parametrize("name", SILU + GELU)
def test_two_halves_are_the_whole(golden: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = golden_logits(golden, name)[0][:40]
    check_halves(golden / f"archs/{name}.gguf", ids, monkeypatch)


@pytest.mark.parametrize("name", FEW)
def test_two_halves_of_other_architectures_are_the_whole(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = TINY_ARCHS[name].write(tmp_path / "tiny.gguf")
    monkeypatch.setitem(FLAGS, "max_model_len", 32)
    check_halves(path, tokens(), monkeypatch)


@pytest.mark.parametrize("cpu", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon7b", "gpt2", "deepseek2"])
def test_different_backends_agree_with_llama_cpp(
    golden: Path, name: str, cpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's place is taken by the other of the two; where the split is nothing or all, there is one of them alone."""
    path, (ids, expected) = golden / f"archs/{name}.gguf", golden_logits(golden, name)
    context = 64 if name == "gpt2" else 256
    as_gpu(monkeypatch, SlowGPU if cpu == "cpu" else small_cpu, cpu)
    for count in (0, 1, num_layers(path), num_layers(path) + 1, "all"):
        found = ways(path, ids, device="cuda", threads=1, gpu_layers=count, max_model_len=context)
        for logits in found:
            assert nmse(logits, expected) <= tolerance(name, "f32")
            assert np.array_equal(logits, found[0])


@pytest.mark.parametrize("count", [1, 2])
def test_tokens_do_not_depend_on_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The embedding is the head's matrix too, on both sides."""
    path = write_mixed_model(tmp_path / "model.gguf")
    requests = [request for request in mixed_requests(300, 20) if len(request[0]["prompt_token_ids"]) < 200]
    flags: dict[str, Any] = {"max_model_len": 256, "skip_tokenizer_init": True, "threads": 2}
    with LLM(path, device="cpu", **flags) as llm:
        alone = [generate(llm, [request])[0] for request in requests]
    as_gpu(monkeypatch, small_cpu)
    for rows, seqs in ((16, 64), (512, 3)):
        sizes: dict[str, Any] = {"max_num_batched_tokens": rows, "max_num_seqs": seqs}
        with LLM(path, device="cuda", gpu_layers=count, **flags, **sizes) as llm:
            assert generate(llm, requests) == alone


def test_samples_and_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that samples share are copied on both sides; states come from the second."""
    path = write_tiny_model(tmp_path / "tiny.gguf", layers=3)
    params = SamplingParams(n=3, seed=5, max_tokens=20, ignore_eos=True)

    def made(**flags: Any) -> tuple[Any, Any]:
        with LLM(path, max_num_seqs=4, max_num_batched_tokens=16, **flags) as llm:
            samples = llm.generate(["hello there", "x" * 40], params, use_tqdm=False)
            states = llm.embed(["hello", "there"], use_tqdm=False)
        ids = [answer.token_ids for output in samples for answer in output.outputs]
        return ids, [output.outputs.embedding for output in states]

    whole = made(device="cpu")
    as_gpu(monkeypatch, small_cpu)
    assert made(device="cuda", gpu_layers=2) == whole


def test_an_encoder_is_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers share the pages of one."""
    path = TINY_ENCODERS["bert"].write(tmp_path / "bert.gguf")
    as_gpu(monkeypatch, SlowGPU)
    for count in (0, "all", 99, "auto"):
        with LLM(path, device="cuda", gpu_layers=count, skip_tokenizer_init=True) as llm:
            assert llm.config.gpu_layers == (count if count == 0 else "all")
    with pytest.raises(ParameterError, match="gpu_layers: got 1, must be 0 or all: bert is an encoder"):
        LLM(path, device="cuda", gpu_layers=1, skip_tokenizer_init=True)
