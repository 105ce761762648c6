"""``shoal tokenize``, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.text.tokenizer import Tokenizer
from tests.cli.conftest import Shoal
from tests.text.tiny import byte_level, sentencepiece

TEXT = "hello w\u00f6rld<|im_end|>"


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    return byte_level(tmp_path / "vocabulary.gguf")


def ids_of(path: Path, text: str, **options: bool) -> list[int]:
    return Tokenizer.from_gguf(path).encode(text, **options)


def test_ids_are_on_one_line(shoal: Shoal, vocabulary: Path, tmp_path: Path) -> None:
    expected = " ".join(map(str, ids_of(vocabulary, TEXT))) + "\n"
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    for done in (
        shoal("tokenize", TEXT, "--model", vocabulary),
        shoal("tokenize", "--model", vocabulary, "-f", "text.txt"),
        shoal("tokenize", "--model", vocabulary, stdin=TEXT),
    ):
        assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


def test_special_tokens_only_where_asked_for(shoal: Shoal, vocabulary: Path, tmp_path: Path) -> None:
    parsed = ids_of(vocabulary, TEXT, parse_special=True)
    assert parsed != ids_of(vocabulary, TEXT)
    done = shoal("tokenize", TEXT, "--model", vocabulary, "--parse-special")
    assert done.stdout.split() == list(map(str, parsed))
    with_bos = sentencepiece(tmp_path / "spm.gguf")
    plain = shoal("tokenize", "hello", "--model", with_bos, "--no-add-special").stdout.split()
    assert shoal("tokenize", "hello", "--model", with_bos).stdout.split() == ["1", *plain]


def test_pieces_and_back(shoal: Shoal, vocabulary: Path) -> None:
    ids = ids_of(vocabulary, TEXT)
    rows = [line.split("\t") for line in shoal("tokenize", TEXT, "--model", vocabulary, "--pieces").stdout.splitlines()]
    assert [int(row[0]) for row in rows] == ids
    assert rows[0][1] == "'hello'"
    done = shoal("tokenize", ",".join(map(str, ids)), "--model", vocabulary, "--decode")
    assert done.stdout == TEXT + "\n"


def test_json(shoal: Shoal, vocabulary: Path) -> None:
    done = shoal("tokenize", "hello", "--model", vocabulary, "--json", "--pieces")
    ids = ids_of(vocabulary, "hello")
    assert json.loads(done.stdout) == {"text": "hello", "ids": ids, "count": len(ids), "pieces": ["hello"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1 two", "--decode"), "token ids: got 'two', must be whole numbers"),
        (("99999", "--decode"), "99999 is not in the vocabulary"),
        (("a", "-f", "vocabulary.gguf"), "give TEXT or --file, not both"),
    ],
)
def test_bad_input(shoal: Shoal, vocabulary: Path, arguments: tuple[str, ...], message: str) -> None:
    done = shoal("tokenize", *arguments, "--model", vocabulary)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
