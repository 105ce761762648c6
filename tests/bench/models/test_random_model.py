"""Files of random weights: the formats promised, a tokenizer for every token, and a network that runs."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from shoal.bench.models.networks import SHAPES, TYPES, Mix, Shape, mix_of, tensors_of, uses_more_bits
from shoal.bench.models.random_model import write_random_model
from shoal.errors import ParameterError
from shoal.gguf.reader import GGUFFile, StringArray
from shoal.llm import LLM
from shoal.models.config import ModelConfig
from shoal.params import SamplingParams
from tests.support.tiny_model import VOCAB_SIZE

SMALL = Shape(
    n_embd=256,
    n_layers=8,
    n_heads=4,
    n_kv_heads=2,
    head_dim=64,
    n_ff=512,
    vocab_size=VOCAB_SIZE + 9,
    context_length=128,
    rope_base=10000.0,
)


def write(folder: Path, type_name: str, tiny: Path, shape: Shape = SMALL) -> Path:
    path = folder / f"{type_name}.gguf"
    write_random_model(path, shape, type_name, tiny, seed=1)
    return path


def formats(type_name: str, shape: Shape) -> dict[str, str]:
    return {t.name.removesuffix(".weight"): t.format.name for t in tensors_of(shape, 1000, mix_of(type_name))}


def test_llama_cpps_rule_of_more_bits() -> None:
    """Of 16 layers: two at either end, and every third between."""
    assert [layer for layer in range(16) if uses_more_bits(layer, 16)] == [0, 1, 4, 7, 10, 13, 14, 15]


@pytest.mark.parametrize(("type_name", "base"), [("Q4_K_M", "Q4_K"), ("Q5_K_M", "Q5_K")])
def test_a_mix_has_more_bits_for_values_and_down_projections(type_name: str, base: str) -> None:
    found = formats(type_name, SHAPES["llama-1b"])
    assert found["token_embd"] == "Q6_K"
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert [found[f"blk.0.{name}"] for name in matrices] == [base, base, "Q6_K", base, base, base, "Q6_K"]
    assert {found[f"blk.2.{name}"] for name in matrices} == {base}


def test_a_head_of_its_own_has_more_bits_than_the_embedding() -> None:
    found = formats("Q4_K_M", SHAPES["llama-8b"])
    assert (found["token_embd"], found["output"]) == ("Q4_K", "Q6_K")
    assert "output" not in formats("Q4_K_M", SHAPES["llama-3b"])


def test_other_types_are_one_format_and_a_good_head() -> None:
    assert mix_of("IQ2_XXS") == Mix("IQ2_XXS", "IQ2_XXS", "Q6_K")
    assert mix_of("Q8_0") == Mix("Q8_0", "Q8_0", "Q8_0")
    with pytest.raises(ParameterError, match=r"type: got 'Q4_K_L', must be one of Q4_K_M, Q5_K_M, F32"):
        mix_of("Q4_K_L")


def test_odd_widths_fall_back_as_in_llama_cpp() -> None:
    """SmolLM2's 576 columns are no whole number of K-quant blocks; its feed-forward of 1536 is."""
    found = formats("Q4_K_M", SHAPES["smollm2-135m"])
    assert [found[name] for name in ("token_embd", "blk.0.attn_q", "blk.0.attn_v", "blk.0.ffn_down")] == [
        "Q8_0",
        "Q5_0",
        "Q8_0",
        "Q6_K",
    ]
    assert formats("IQ3_XXS", SHAPES["smollm2-135m"])["blk.0.attn_q"] == "IQ4_NL"


@pytest.mark.parametrize("type_name", TYPES)
def test_a_file_is_what_it_promises(tmp_path: Path, tiny: Path, type_name: str) -> None:
    path = write(tmp_path, type_name, tiny)
    with GGUFFile.open(path) as file:
        config = ModelConfig.from_gguf(file)
        found = Counter(info.format.name for info in file.tensors.values())
    assert (config.n_layers, config.n_embd, config.n_ff, config.vocab_size) == (8, 256, 512, VOCAB_SIZE + 9)
    assert (config.n_heads, config.n_kv_heads, config.head_dim, config.rope_base) == (4, 2, 64, 10000.0)
    mix = mix_of(type_name)
    assert found == Counter({"F32": 17}) + Counter({mix.base: 48}) + Counter({mix.more: 8}) + Counter({mix.head: 1})
    assert list(tmp_path.iterdir()) == [path]


def test_the_tokenizer_is_filled_up(tmp_path: Path, tiny: Path) -> None:
    with GGUFFile.open(tiny) as source, GGUFFile.open(write(tmp_path, "Q4_0", tiny)) as file:
        tokens = file.get("tokenizer.ggml.tokens", StringArray).tolist()
        types = file.get("tokenizer.ggml.token_type", np.ndarray)
        assert tokens == source.get("tokenizer.ggml.tokens", StringArray).tolist() + [
            f"[PAD{i}]" for i in range(VOCAB_SIZE, VOCAB_SIZE + 9)
        ]
        assert types.tolist() == source.get("tokenizer.ggml.token_type", np.ndarray).tolist() + [5] * 9
        for key in ("tokenizer.ggml.model", "tokenizer.ggml.eos_token_id", "tokenizer.chat_template"):
            assert file.metadata[key] == source.metadata[key]


def test_a_larger_tokenizer_sets_the_vocabulary(tmp_path: Path, tiny: Path) -> None:
    shape = Shape(**{name: getattr(SMALL, name) for name in Shape.__slots__} | {"vocab_size": 32})
    with GGUFFile.open(write(tmp_path, "Q8_0", tiny, shape)) as file:
        assert file.tensors["token_embd.weight"].shape == (VOCAB_SIZE, 256)


def test_the_same_seed_gives_the_same_file(tmp_path: Path, tiny: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, seed in zip(paths, (3, 3, 4), strict=True):
        write_random_model(path, SMALL, "Q4_K_M", tiny, seed)
    same, again, other = (path.read_bytes() for path in paths)
    assert same == again != other


@pytest.mark.parametrize("type_name", ["Q4_K_M", "TQ2_0"])
def test_the_network_runs(tmp_path: Path, tiny: Path, type_name: str) -> None:
    path = write(tmp_path, type_name, tiny)
    with LLM(path, device="reference", max_num_seqs=1, skip_tokenizer_init=True) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=1)
        (output,) = llm.generate([{"prompt_token_ids": [1, 2, 3]}], params, use_tqdm=False)
    assert output.error is None
    assert len(output.outputs[0].token_ids) == 4
    assert np.isfinite(output.outputs[0].cumulative_logprob or 0.0)


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_cpp_runs_it(tmp_path: Path, smollm2_path: Path) -> None:
    from shoal.bench.peers.llama_worker import Llama

    path = write(tmp_path, "Q4_K_M", smollm2_path)
    assert Llama(str(path), 1).measure([[1, 2, 3]], 2, True, False)["decode_seconds"] > 0
