"""Which files can be draft models: those of the same vocabulary, that continue texts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal.cli.inspect import model_facts
from shoal.engine.draft_file import open_draft
from shoal.engine.placement import open_backend
from shoal.errors import GGUFError, MemoryLimitError, ModelNotFoundError, ParameterError
from shoal.gguf.reader import GGUFFile
from shoal.kernels.split import SplitBackend
from shoal.llm import LLM
from shoal.params import EngineConfig
from tests.engine.random_network import write_network
from tests.support.gguf_builder import payload, string
from tests.support.no_gpu import SlowGPU, as_gpu
from tests.support.tiny_encoders import TINY_ENCODERS
from tests.support.tiny_model import END_ID, VOCAB_SIZE, write_tiny_model


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "target.gguf")


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "draft.gguf", layers=1, context=64, seed=1)


def guessing(path: Path | str) -> dict[str, Any]:
    return {"device": "reference", "speculative_config": {"method": "draft_model", "model": path}}


def opened(target: Path, draft: Path | str) -> Any:
    with GGUFFile.open(target) as file, open_draft(file, EngineConfig(**guessing(draft))) as found:
        return found


def patched(path: Path, before: bytes, after: bytes) -> Path:
    """The same file with other bytes at one place."""
    data = path.read_bytes()
    assert data.count(before) == 1
    assert len(before) == len(after)
    path.write_bytes(data.replace(before, after))
    return path


def test_a_model_of_the_same_vocabulary_is_one(target: Path, draft: Path) -> None:
    found = opened(target, draft)
    assert (found.model.n_layers, found.model.context_length) == (1, 64)
    assert found.weights_bytes == sum(info.nbytes for info in found.file.tensors.values())
    with LLM(target, **guessing(draft)) as llm:
        plan = llm.engine.memory_plan
        assert plan.draft is not None
        assert (plan.max_model_len, plan.draft.max_model_len) == (512, 64)
        assert llm.generate("abc", use_tqdm=False)[0].error is None


def test_another_token_is_named_with_both_files(target: Path, draft: Path) -> None:
    patched(draft, string(b"<|im_start|>"), string(b"<|im_stamp|>"))
    says = f"of the same vocabulary as {target}: token {END_ID - 1} is '<|im_start|>' there, '<|im_stamp|>' in {draft}"
    with pytest.raises(ParameterError, match=re.escape(says)) as caught:
        LLM(target, **guessing(draft))
    assert (caught.value.field, caught.value.value) == ("speculative_config.model", str(draft))


def test_another_end_is_named(target: Path, draft: Path) -> None:
    key = string(b"tokenizer.ggml.eos_token_id") + (4).to_bytes(4, "little")
    patched(draft, key + payload(END_ID, 4), key + payload(END_ID - 2, 4))
    with pytest.raises(ParameterError, match=rf"eos is token {END_ID} there, {END_ID - 2} in "):
        opened(target, draft)


def test_another_kind_of_tokenizer_is_named(target: Path, draft: Path) -> None:
    patched(draft, string(b"gpt2"), string(b"bert"))
    with pytest.raises(ParameterError, match=r"tokenizer.ggml.model is 'gpt2' there, 'bert' in "):
        opened(target, draft)


def test_more_tokens_are_named(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tests.support.tiny_model.CONTROL_TOKENS", ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|x|>")
    )
    larger = write_tiny_model(tmp_path / "larger.gguf")
    with pytest.raises(ParameterError, match=rf"there are {VOCAB_SIZE} tokens there, {VOCAB_SIZE + 1} in "):
        opened(target, larger)


def test_more_rows_than_tokens_are_named(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.tiny_model.VOCAB_SIZE", VOCAB_SIZE + 5)
    larger = write_tiny_model(tmp_path / "larger.gguf")
    with pytest.raises(ParameterError, match=rf"embedding has {VOCAB_SIZE} rows there, {VOCAB_SIZE + 5} in "):
        opened(target, larger)


def test_what_is_no_model_that_continues_texts_is_refused_by_name(tmp_path: Path, target: Path) -> None:
    encoder = replace(TINY_ENCODERS["bert"], words=True).write(tmp_path / "encoder.gguf")
    with pytest.raises(
        ParameterError, match=r"speculative_config.model: got .*encoder.gguf.*, must be no encoder such as bert"
    ):
        LLM(target, **guessing(encoder))
    nothing = tmp_path / "nothing.gguf"
    with pytest.raises(ModelNotFoundError, match=r"nothing\.gguf"):
        LLM(target, **guessing(nothing))
    nothing.write_bytes(b"no model at all")
    with pytest.raises(GGUFError, match=r"nothing\.gguf"):
        LLM(target, **guessing(nothing))
    with pytest.raises(GGUFError, match=r"network.gguf: tokenizer.ggml.model .*missing"):
        opened(target, write_network(tmp_path / "network.gguf", "llama"))


def test_an_encoder_has_nothing_to_guess(tmp_path: Path, draft: Path) -> None:
    encoder = replace(TINY_ENCODERS["bert"], words=True).write(tmp_path / "encoder.gguf")
    assert opened(encoder, draft) is None
    with LLM(encoder, **guessing(draft)) as llm:
        assert llm.engine.memory_plan.draft is None


def test_a_drafter_of_ones_own_takes_its_place(target: Path, draft: Path) -> None:
    class Nothing:
        longest = 1

        def draft(self, wanted: Any) -> list[list[int]]:
            return [[] for _ in wanted]

        def ended(self, key: object, output: list[int]) -> None:
            return None

    with LLM(target, drafter=Nothing(), **guessing(draft)) as llm:
        assert llm.engine.memory_plan.draft is None


def test_it_has_its_share_of_a_gpu(target: Path, draft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies where the head is, and takes the place of layers there."""
    with GGUFFile.open(target) as file, GGUFFile.open(draft) as small:
        weights, own = (sum(info.nbytes for info in one.tensors.values()) for one in (file, small))
        page = 16 * 2 * 2 * 16 * 2  # of a layer: 16 positions, K and V of 2 heads of 16 in float16
        room = weights + own + 3 * 32 * page
        for missing, layers in ((0, "all"), (1, 2)):
            as_gpu(monkeypatch, lambda missing=missing: SlowGPU(room - missing), "reference")  # type: ignore[misc]
            config = EngineConfig(**{**guessing(draft), "device": "cuda"})
            with open_draft(file, config) as found:
                backend, decided = open_backend(file, config, draft=found)
                assert (decided.gpu_layers, isinstance(backend, SplitBackend)) == (layers, layers != "all")
            facts = model_facts(file, config)["memory"]
            assert facts["draft_model"]["kv_cache"] == facts["groups"][0]["pages"] * page
    monkeypatch.undo()
    as_gpu(monkeypatch, SlowGPU, "reference")
    with LLM(target, device="reference", max_num_seqs=2) as plain:
        (expected,) = plain.generate("abc", use_tqdm=False)
    with LLM(target, gpu_layers=2, max_num_seqs=2, speculative_config={"method": "draft_model", "model": draft}) as llm:
        (found_text,) = llm.generate("abc", use_tqdm=False)
        assert found_text.outputs[0].token_ids == expected.outputs[0].token_ids


def test_memory_for_its_weights_is_asked_for(target: Path, draft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with GGUFFile.open(target) as file:
        weights = sum(info.nbytes for info in file.tensors.values())
    as_gpu(monkeypatch, lambda: SlowGPU(weights - 1), "reference")
    with pytest.raises(MemoryLimitError, match="the weights need"):
        LLM(target, **{**guessing(draft), "device": "cuda", "gpu_layers": "all"})
