"""What a network becomes when it is bound: how many launches, and the same numbers whatever is fused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.kernels.base import PAGE_SIZE, BoundNetwork, Linear, StepInput
from shoal.kernels.cuda.launch import launches_go_to
from shoal.kernels.cuda.linear import linear_gated
from shoal.kernels.cuda.pack import pack_matrix
from shoal.kernels.cuda.recording import Recording
from shoal.llm import LLM
from tests.kernels.cuda.test_sample import how
from tests.kernels.cuda.weights import random_tensor
from tests.support.tiny_archs import TINY_ARCHS
from tests.support.tiny_model import write_tiny_model

WIDTH = 512  # of the last product twice that, so that its K is cut into pieces


def chunk(rows: int) -> StepInput:
    """One sequence that ends with so many new tokens, behind one that is there."""
    positions = np.arange(1, rows + 1, dtype=np.int32)
    starts, lengths = np.array([0, rows], np.int32), np.array([rows + 1], np.int32)
    pages = np.arange(-(-(rows + 1) // PAGE_SIZE), dtype=np.int32)
    return StepInput(positions, positions, starts, lengths, pages[None, None])


@contextmanager
def kernels_noted() -> Iterator[list[Any]]:
    """What is launched meanwhile, instead of running."""
    kernels: list[Any] = []
    with launches_go_to(lambda kernel, grid, args, options: kernels.append(kernel)):
        yield kernels


def launched(network: BoundNetwork, step: StepInput) -> list[str]:
    """Names of the kernels of a step."""
    with kernels_noted() as kernels:
        network.layers(step)
    return [kernel.__name__ for kernel in kernels]


@pytest.mark.parametrize("biases", [False, True])
def test_a_layer_of_a_step_that_decodes_takes_eight_launches(tmp_path: Path, biases: bool) -> None:
    kernels = []
    for layers in (1, 2):
        path = write_tiny_model(tmp_path / f"{layers}.gguf", layers=layers, width=WIDTH, fmt="Q4_0", biases=biases)
        with LLM(path, device="cuda", max_num_seqs=2, max_num_batched_tokens=8) as llm:
            assert llm.engine._compute is not None
            kernels.append(launched(llm.engine._compute[0].network, chunk(1)))
    assert len(kernels[1]) - len(kernels[0]) <= 8, kernels[1]


@pytest.mark.parametrize("name", ["starcoder", "olmoe", "deepseek2_unsplit"])
def test_all_kernels_of_a_step_can_be_set_up_while_the_one_before_runs(tmp_path: Path, name: str) -> None:
    """With its head, and the sampling of tokens for which nothing out of the ordinary is asked."""
    path = TINY_ARCHS[name].write(tmp_path / "tiny.gguf")
    one = np.zeros(1, np.int32)
    with LLM(path, device="cuda", skip_tokenizer_init=True, max_num_seqs=2, max_num_batched_tokens=8) as llm:
        assert llm.engine._compute is not None
        network = llm.engine._compute[0].network
        with kernels_noted() as kernels:
            network.layers(chunk(1))
            network.sample(one, how(1, temperature=0.0))
            network.sample(one, how(1, temperature=1.0, top_k=40))
    names = {kernel.__name__ for kernel in kernels}
    assert {"_norm", "_product", "_split", "choose", "weigh_chunk"} <= names
    assert {kernel.__name__ for kernel in kernels if "PDL" not in kernel.arg_names} == set()


def test_rows_are_rounded_as_they_are_read_or_before_to_the_same_bits(tmp_path: Path) -> None:
    """By the products behind attention and behind the gate: many rows before, few as they are read."""
    path, tokens = write_tiny_model(tmp_path / "tiny.gguf", layers=1, fmt="Q4_0"), list(range(1, 81))
    logits = []
    for rows, halves in ((128, 2), (32, 0)):
        with LLM(path, device="cuda", max_num_seqs=2, max_num_batched_tokens=rows, max_model_len=128) as llm:
            logits.append(llm.logits(tokens))
            assert llm.engine._compute is not None
            names = launched(llm.engine._compute[0].network, chunk(rows - 10))
            assert names.count("_make_half") == halves, names
    assert np.array_equal(logits[0], logits[1])


def test_no_product_leaves_largest_magnitudes_where_it_reads_others() -> None:
    recording, weights = Recording(8), Linear(pack_matrix([random_tensor("F16", 128, 64)]))
    x = recording.new_rows(64)
    for _ in range(4):
        x = recording.gated(recording.product(x, weights), "silu")
    calls = [call.arguments for call in recording.calls if call.run is linear_gated]
    assert [call["source"].largest is None for call in calls] == [True, False, False, False]
    for call in calls[1:3]:
        assert call["largest"].data_ptr() != call["source"].largest.data_ptr()
