"""``shoal inspect``, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.llm import LLM
from tests.cli.conftest import Shoal
from tests.support.gguf_builder import GGUFBuilder
from tests.support.tiny_model import END_ID, VOCAB_SIZE, write_tiny_model

FLAGS = ("--device", "reference", "--max-num-seqs", "4")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny.gguf", fmt="Q8_0")


def facts(shoal: Shoal, *arguments: str | Path) -> dict[str, Any]:
    done = shoal("inspect", *arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_json_holds_all_facts(shoal: Shoal, model: Path) -> None:
    found = facts(shoal, model, *FLAGS)
    assert (found["supported"], found["reason"], found["architecture"]) == (True, None, "llama")
    assert found["hyper_parameters"]["block_count"] == 2
    assert found["file"] == {"path": str(model), "bytes": model.stat().st_size, "gguf_version": 3}
    types = found["tensors"]["types"]
    assert {name: row["count"] for name, row in types.items()} == {"Q8_0": 15, "F32": 5}
    assert sum(row["bytes"] for row in types.values()) == found["tensors"]["bytes"]
    tokenizer = found["tokenizer"]
    assert (tokenizer["model"], tokenizer["size"], tokenizer["eos"]["id"]) == ("gpt2", VOCAB_SIZE, END_ID)
    ends = {end["id"]: end["source"] for end in tokenizer["end_of_generation"]}
    assert ends[END_ID] == "tokenizer.ggml.eos_token_id"
    assert found["chat_template"]["present"]
    assert (found["chat_template"]["tool_call_parser"], found["chat_template"]["reasoning_parser"]) == (
        "hermes",
        "none",
    )
    assert found["backend"].startswith("reference")


def test_how_answers_are_read_follows_the_template_and_the_flags(shoal: Shoal, model: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("[TOOL_CALLS] <think></think>")
    for flags, expected in (
        (("--chat-template", template), ("mistral", "think")),
        (("--tool-call-parser", "pythonic", "--reasoning-parser", "granite"), ("pythonic", "granite")),
        (("--tool-call-parser", "none"), ("none", "none")),
    ):
        found = facts(shoal, model, *FLAGS, *flags)["chat_template"]
        assert (found["tool_call_parser"], found["reasoning_parser"]) == expected
    assert "tool_call_parser  hermes" in shoal("inspect", model, *FLAGS).stdout


def test_the_memory_plan_is_the_one_that_an_engine_makes(shoal: Shoal, model: Path) -> None:
    found = facts(shoal, model, *FLAGS, "--kv-cache-memory", "1MiB")
    with LLM(model, device="reference", max_num_seqs=4, kv_cache_memory="1MiB") as llm:
        plan = llm.engine.memory_plan
    memory = found["memory"]
    (group,) = plan.groups
    assert memory["groups"] == [{"window": 0, "layers": 2, "pages": group.num_pages, "page": group.page_bytes}]
    assert (memory["kv_cache"], memory["weights"]) == (plan.kv_bytes, plan.weights_bytes)
    assert memory["sequences_that_fit"] == {"512": plan.num_tokens // 512}
    assert found["defaults"]["kv_cache_memory"] == plan.kv_bytes
    assert (found["defaults"]["max_num_seqs"], found["defaults"]["max_model_len"]) == (4, 512)


def test_words_for_people(shoal: Shoal, model: Path) -> None:
    done = shoal("inspect", model, *FLAGS)
    assert done.returncode == 0
    for words in ("supported      yes", "sequences fit", "ends a generation: 258", "<|im_start|>", "max_num_seqs"):
        assert words in done.stdout


def test_the_sampling_that_a_file_recommends(shoal: Shoal, model: Path) -> None:
    assert facts(shoal, model, *FLAGS)["sampling_defaults"] == {}
    write_tiny_model(model, keys={"general.sampling.temp": 0.6, "general.sampling.top_k": 20})
    assert facts(shoal, model, *FLAGS)["sampling_defaults"] == {"temperature": 0.6, "top_k": 20}
    assert "recommends for chats" in shoal("inspect", model, *FLAGS).stdout


def test_an_unsupported_model_says_why(shoal: Shoal, tmp_path: Path) -> None:
    builder = GGUFBuilder()
    builder.add("general.architecture", "mamba")
    builder.add("mamba.block_count", 3)
    builder.add_tensor("token_embd.weight", np.zeros((4, 4)))
    path = builder.write(tmp_path / "mamba.gguf")
    found = facts(shoal, path, *FLAGS)
    assert found["supported"] is False
    assert "'mamba' is not supported; known: " in found["reason"]
    assert found["hyper_parameters"] == {"block_count": 3}
    assert "error" in found["tokenizer"]
    assert found["chat_template"]["present"] is False
    assert found["chat_template"]["tool_call_parser"] == "none"
    done = shoal("inspect", path, *FLAGS)
    assert "supported      no: general.architecture: 'mamba'" in done.stdout
    assert "not usable" in done.stdout


def test_text_that_is_not_utf_8_is_shown_and_keeps_no_model_from_running(
    shoal: Shoal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tiny_model(tmp_path / "odd.gguf", name="Mod\u00e8le".encode("latin-1"), template=b"{{ '\xe8' }}")
    found = facts(shoal, path, *FLAGS)
    assert (found["supported"], found["name"]) == (True, "Mod\ufffdle")
    assert found["chat_template"]["start"] == ["{{ '\ufffd' }}"]
    assert found["tokenizer"]["size"] == VOCAB_SIZE
    done = shoal("inspect", path, *FLAGS)
    assert "llama  Mod\ufffdle" in done.stdout
    done = shoal("complete", path, "-p", "a", "--max-tokens", "1", "--device", "reference")
    assert (done.returncode, bool(done.stdout)) == (0, True)
    assert "tokenizer.chat_template at byte" in caplog.text
    assert "not UTF-8" in caplog.text


def test_gemma_is_supported(shoal: Shoal, gemma3_path: Path) -> None:
    found = facts(shoal, gemma3_path, *FLAGS)
    assert found["supported"] is True
    assert found["tokenizer"]["size"] == 262144


def test_memory_of_layers_with_windows(shoal: Shoal, golden: Path) -> None:
    path, flags = golden / "archs/gemma2.gguf", (*FLAGS, "--max-model-len", "256", "--max-num-batched-tokens", "32")
    groups = facts(shoal, path, *flags)["memory"]["groups"]
    assert [(group["window"], group["layers"]) for group in groups] == [(8, 2), (0, 1)]
    assert [group["pages"] for group in groups] == [4 + 3 * 2, 4 * 16]  # one in its prompt, three behind it
    done = shoal("inspect", path, *flags)
    assert "window 8       2 layers: 10 pages" in done.stdout
    assert "whole context  1 layers: 64 pages" in done.stdout


def test_check_tensors_finds_what_is_not_finite(shoal: Shoal, tmp_path: Path) -> None:
    good = write_tiny_model(tmp_path / "good.gguf")
    assert facts(shoal, good, *FLAGS, "--check-tensors")["bad_tensors"] == []
    data = bytearray(good.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()  # the last value of the last norm
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data)
    done = shoal("inspect", bad, *FLAGS, "--check-tensors")
    assert done.returncode == 2
    assert "bad tensor" in done.stdout
    assert "blk.1.ffn_norm.weight" in done.stdout


def test_a_broken_file_is_one_line_and_exit_code_2(shoal: Shoal, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    done = shoal("inspect", path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"shoal: {path}: ")
    assert done.stderr.count("\n") == 1


def test_what_a_draft_model_takes(shoal: Shoal, model: Path, tmp_path: Path) -> None:
    draft = write_tiny_model(tmp_path / "draft.gguf", layers=1, context=64)
    plain, memory = (facts(shoal, model, *FLAGS, *more)["memory"] for more in ((), ("--draft-model", draft)))
    kv_per_token = memory["kv_per_token"] // 2  # one layer of two
    tokens = memory["tokens"]
    weights = facts(shoal, draft, *FLAGS)["memory"]["weights"]
    assert memory["draft_model"] == {
        "weights": weights,
        "kv_per_token": kv_per_token,
        "kv_cache": kv_per_token * tokens,
        "max_model_len": 64,
    }
    assert {name: value for name, value in memory.items() if name != "draft_model"} == plain
    assert "draft model" in shoal("inspect", model, *FLAGS, "--draft-model", draft).stdout
    other = write_tiny_model(tmp_path / "other.gguf", keys={"tokenizer.ggml.bos_token_id": 7})
    refused = shoal("inspect", model, *FLAGS, "--draft-model", other)
    assert refused.returncode != 0
    assert "bos is token None there, 7 in" in refused.stderr
