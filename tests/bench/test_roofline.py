"""The analytic model, worked out by hand for a small file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shoal.bench.machine import Machine
from shoal.bench.roofline import NetworkCost, Work, decode_work, prefill_work
from shoal.gguf.reader import GGUFFile
from tests.support.gguf_builder import GGUFBuilder
from tests.support.tiny_model import VOCAB_SIZE, write_tiny_model

COST = NetworkCost(weight_bytes=1000, layer_macs=50, head_macs=7, attention_macs=3, kv_bytes=10)
MACHINE = Machine("", 1, 0, 1, read_bandwidth=100.0, mac_rate=10.0)

# Of the tiny model: 2 layers of width 64, 4 heads of 16, 2 KV heads, feed-forward 128.
LAYER = 64 * 64 * 2 + 32 * 64 * 2 + 3 * 128 * 64
HEAD = VOCAB_SIZE * 64


def test_the_cost_of_a_file_with_tied_embedding(tmp_path: Path) -> None:
    with GGUFFile.open(write_tiny_model(tmp_path / "tiny.gguf", fmt="Q4_1")) as file:
        cost = NetworkCost.of(file)
    assert cost == NetworkCost(
        weight_bytes=(2 * LAYER + HEAD) * 20 // 32,
        layer_macs=2 * LAYER,
        head_macs=HEAD,
        attention_macs=2 * 2 * 4 * 16,
        kv_bytes=2 * 2 * 2 * 16 * 2,
    )


def test_an_embedding_that_is_not_the_head_is_not_read(tmp_path: Path) -> None:
    builder = GGUFBuilder()
    builder.add("general.architecture", "llama")
    for key in ("embedding_length", "block_count", "feed_forward_length", "context_length"):
        builder.add(f"llama.{key}", 32)
    builder.add("llama.attention.head_count", 2)
    builder.add("llama.attention.layer_norm_rms_epsilon", 1e-5)
    builder.add_tensor("token_embd.weight", np.zeros((100, 32)))
    builder.add_tensor("output.weight", np.zeros((100, 32)), "F16")
    builder.add_tensor("blk.0.attn_norm.weight", np.zeros(32))
    with GGUFFile.open(builder.write(tmp_path / "untied.gguf")) as file:
        cost = NetworkCost.of(file)
    assert (cost.weight_bytes, cost.layer_macs, cost.head_macs) == (100 * 32 * 2, 0, 100 * 32)


def test_a_decode_step_reads_weights_once_and_each_kv() -> None:
    assert decode_work(COST, batch=4, context=20) == Work(1000 + 4 * 20 * 10, 4 * (50 + 7 + 20 * 3))


def test_a_prefill_reads_weights_once_a_step() -> None:
    work = prefill_work(COST, prompts=3, length=5, rows_per_step=8)  # 15 tokens are 2 steps
    assert work == Work(2 * 1000 + 15 * 10, 15 * 50 + 3 * 7 + 3 * (1 + 2 + 3 + 4 + 5) * 3)


@pytest.mark.parametrize(("work", "seconds"), [(Work(500, 10), 5.0), (Work(100, 80), 8.0)])
def test_the_slower_of_memory_and_arithmetic_decides(work: Work, seconds: float) -> None:
    assert work.floor_seconds(MACHINE) == seconds
