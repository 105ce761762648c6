"""A tokenizer with a token for each byte, and a compiler for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shoal.constrain.compiler import ConstraintCompiler
from shoal.text.tokenizer import Tokenizer
from tests.support.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_gguf(write_tiny_model(tmp_path_factory.mktemp("constrain") / "tiny.gguf"))


@pytest.fixture(scope="session")
def compiler(tokenizer: Tokenizer) -> Iterator[ConstraintCompiler]:
    compiler = ConstraintCompiler(tokenizer)
    yield compiler
    compiler.close()
