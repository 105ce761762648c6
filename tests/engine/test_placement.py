"""How much of a model goes to a GPU, and how many KV pages there are where it lies on two devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.cli.inspect import model_facts
from shoal.engine.placement import open_backend, settled
from shoal.errors import JobError, MemoryLimitError, ParameterError, UnsupportedError
from shoal.gguf.reader import GGUFFile
from shoal.jobs.running.launch import run
from shoal.kernels.split import Cut, SplitBackend
from shoal.llm import LLM
from shoal.params import EngineConfig
from tests.support.no_gpu import SlowGPU, as_gpu
from tests.support.tiny_model import write_tiny_model

LAYERS = 4
PAGE = 16 * 2 * 2 * 16 * 2  # bytes of a layer: 16 positions, K and V of 2 heads of 16 in float16
SEQUENCE = 128 // 16 * PAGE  # of 128 tokens, in a layer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny.gguf", layers=LAYERS, context=128)


@pytest.fixture
def weights(path: Path) -> dict[str, int]:
    """Bytes in the file of a layer, and of the head with its norm."""
    with GGUFFile.open(path) as file:
        sizes = {name: info.nbytes for name, info in file.tensors.items()}
    return {
        "layer": sum(size for name, size in sizes.items() if name.startswith("blk.0.")),
        "head": sizes.get("output.weight", sizes["token_embd.weight"]) + sizes["output_norm.weight"],
        "all": sum(sizes.values()),
    }


def decided(path: Path, monkeypatch: pytest.MonkeyPatch, room: int | None, **flags: Any) -> tuple[str, int | str]:
    """Device and layers of the GPU, if that has ``room``."""
    as_gpu(monkeypatch, lambda: SlowGPU(room), "reference")
    with GGUFFile.open(path) as file:
        config = settled(file, EngineConfig(**flags))
        backend, again = open_backend(file, config)
        backend.close()
    assert again == config
    return config.device, config.gpu_layers


def test_names_tell_whose_a_tensor_is() -> None:
    cut = Cut(2, 64, tied=False)
    second = ("blk.2.attn_q.weight", "blk.11.ffn_up.bias", "output.weight", "output_norm.weight", "blk.99999999999.x")
    first = ("blk.1.attn_q.weight", "token_embd.weight", "token_embd_norm.weight", "position_embd.weight")
    assert {cut.sides(name) for name in second} == {(1,)}
    assert {cut.sides(name) for name in first} == {(0,)}
    assert Cut(2, 64, tied=True).sides("token_embd.weight") == (0, 1)


def test_auto_takes_what_fits_with_one_sequence(
    path: Path, weights: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = weights["layer"] + SEQUENCE
    assert decided(path, monkeypatch, weights["all"] + LAYERS * SEQUENCE) == ("cuda", "all")
    assert decided(path, monkeypatch, weights["all"] + LAYERS * SEQUENCE - 1) == ("cuda", LAYERS)
    assert decided(path, monkeypatch, weights["head"] + 2 * layer) == ("cuda", 3)
    assert decided(path, monkeypatch, weights["head"] + 2 * layer - 1) == ("cuda", 2)
    assert decided(path, monkeypatch, weights["head"]) == ("cuda", 1)
    assert decided(path, monkeypatch, weights["head"] - 1) == ("cpu", 0)
    assert decided(path, monkeypatch, None) == ("cuda", "all")


def test_auto_heeds_what_the_user_wants_of_kv_memory(
    path: Path, weights: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    room = weights["all"] + LAYERS * SEQUENCE
    assert decided(path, monkeypatch, room, kv_cache_memory=LAYERS * SEQUENCE) == ("cuda", "all")
    assert decided(path, monkeypatch, room, kv_cache_memory=2 * LAYERS * SEQUENCE) == ("cuda", LAYERS)


def test_layers_are_counted_as_llama_cpp_does(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is the first."""
    as_gpu(monkeypatch, SlowGPU, "reference")
    with GGUFFile.open(path) as file:
        for count, first_layer in ((1, 4), (2, 3), (4, 1)):
            backend, config = open_backend(file, EngineConfig(device="cuda", gpu_layers=count))
            assert isinstance(backend, SplitBackend)
            assert (backend.cut.first_layer, config.gpu_layers) == (first_layer, count)
        for all_of_it in (5, 99, "all"):
            backend, config = open_backend(file, EngineConfig(device="cuda", gpu_layers=all_of_it))
            assert (backend.name, config.gpu_layers) == ("slow", "all")
        for device in ("auto", "cuda"):
            backend, config = open_backend(file, EngineConfig(device=device, gpu_layers=0))
            assert (backend.name, config.device) == ("reference", "cpu")


def test_layers_without_a_gpu_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.engine.placement.find_device", lambda device: "cpu")
    with GGUFFile.open(path) as file, pytest.raises(ParameterError, match="must be auto or 0: there is no GPU"):
        open_backend(file, EngineConfig(gpu_layers=3))


def test_pages_are_as_many_as_the_tighter_of_both_has_room_for(
    path: Path, weights: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    room = weights["head"] + weights["layer"] + SEQUENCE + 5 * PAGE
    as_gpu(monkeypatch, lambda: SlowGPU(room), "reference")
    with GGUFFile.open(path) as file:
        facts = model_facts(file, EngineConfig(device="cuda", gpu_layers=2, max_num_seqs=9))
    memory = facts["memory"]
    assert [group["pages"] for group in memory["groups"]] == [8 + 5]
    assert [(part["backend"], part["layers"], part["head"]) for part in memory["parts"]] == [
        ("reference", 3, False),
        ("slow", 1, True),
    ]
    assert [part["kv_cache"] for part in memory["parts"]] == [3 * 13 * PAGE, 13 * PAGE]
    assert memory["parts"][1]["weights"] == weights["head"] + weights["layer"]
    assert facts["backend"].startswith("the first 3 layers on reference")


def test_memory_that_is_not_there_is_named(
    path: Path, weights: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    room = SEQUENCE - 1
    as_gpu(monkeypatch, lambda: SlowGPU(room), "reference")
    flags: dict[str, Any] = {"device": "cuda", "gpu_layers": 2, "max_num_seqs": 2}
    needed = weights["head"] + weights["layer"]
    with pytest.raises(MemoryLimitError, match=f"the weights need {needed} bytes, {room} bytes .* in a card"):
        LLM(path, **flags)


def test_a_size_that_one_side_has_no_room_for_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SlowGPU(1 << 30)
    as_gpu(monkeypatch, lambda: gpu, "reference")
    with LLM(path, device="cuda", gpu_layers=2, max_num_seqs=2, kv_cache_memory=4 * PAGE * 8) as llm:
        gpu.room = 4 * PAGE  # beside the 8 pages that are there
        llm.resize(kv_cache_memory=4 * PAGE * 12)
        gpu.room = 4 * PAGE - 1
        says = f"{16 * PAGE} bytes are needed on slow, {12 * PAGE + 4 * PAGE - 1} bytes"
        with pytest.raises(MemoryLimitError, match=says):
            llm.resize(kv_cache_memory=4 * PAGE * 16)
        assert llm.engine.num_pages == (12,)


def test_a_job_goes_on_with_the_same_split_alone(
    path: Path, tmp_path: Path, weights: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"row {i}", "max_tokens": 2}) + "\n" for i in range(3)))

    def again(room: int | None, **flags: Any) -> int:
        as_gpu(monkeypatch, lambda: SlowGPU(room), "reference")
        return run(path, source, output, show_progress=False, max_num_seqs=2, **flags).done

    room = weights["head"] + 2 * (weights["layer"] + SEQUENCE)
    assert again(room) == again(room, device="cuda") == again(None, gpu_layers=3) == 3
    for flags, says in (
        ({"gpu_layers": 2}, "numerics.gpu_layers: was 3, is 2"),
        ({"gpu_layers": "all"}, 'numerics.gpu_layers: was 3, is "all"'),
        ({"gpu_layers": 0}, 'numerics.device: was "cuda", is "cpu"'),
        ({"device": "cpu"}, "numerics.gpu_layers: was 3, is absent"),
    ):
        with pytest.raises(JobError, match="belongs to another job") as error:
            again(None, **flags)
        assert says in str(error.value)
    with pytest.raises(JobError, match=r"numerics.gpu_layers: was 3, is 1"):
        again(weights["head"])


def test_what_was_decided_is_said_and_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_gpu(monkeypatch, SlowGPU, "reference")
    with LLM(path, gpu_layers=3, max_num_seqs=2) as llm:
        assert (llm.config.device, llm.config.gpu_layers) == ("cuda", 3)
    assert "the first 2 layers on reference" in capsys.readouterr().err
    with LLM(path, device="reference", max_num_seqs=2) as llm:
        assert (llm.config.device, llm.config.gpu_layers) == ("reference", "auto")
    assert capsys.readouterr().err == ""


def test_a_type_that_the_owner_does_not_know_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlowGPU, "supports", lambda self, kind: False)
    as_gpu(monkeypatch, SlowGPU, "reference")
    with pytest.raises(UnsupportedError, match=r"tensor token_embd.*: type F32 is not supported yet on slow"):
        LLM(path, gpu_layers=2)
    with LLM(path, gpu_layers=0, max_num_seqs=2) as llm:
        assert np.isfinite(llm.logits([1, 2])).all()
