from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import GGUFError, RequestError, UnsupportedError
from shoal.gguf.reader import GGUFFile
from shoal.text.bpe import _LETTERS
from shoal.text.tokenizer import Tokenizer
from tests.support.effort import at_most_lines
from tests.text import tiny

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
SPECIAL_TEXT = st.lists(
    st.sampled_from([*tiny.CONTROL, *tiny.USER_DEFINED, "<", "|>", "hello", " world", "\n", " "]) | TEXT, max_size=8
).map("".join)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_gguf(tiny.byte_level(tmp_path_factory.mktemp("bpe") / "v.gguf"))


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_gguf(tiny.sentencepiece(tmp_path_factory.mktemp("spm") / "v.gguf"))


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[bytes]:
    return [tokenizer.token_bytes(token) for token in ids]


def test_merges_by_rank_within_words(bpe: Tokenizer) -> None:
    assert pieces(bpe, bpe.encode("hello world 12")) == [b"hello", b" world", b" ", b"1", b"2"]
    assert pieces(bpe, bpe.encode("ababab")) == [b"abab", b"ab"]


def test_opens_an_open_file_too(tmp_path: Path, bpe: Tokenizer) -> None:
    with GGUFFile.open(tiny.byte_level(tmp_path / "v.gguf")) as file:
        assert Tokenizer.from_gguf(file).encode("hello") == bpe.encode("hello")


def test_control_tokens_only_where_asked(bpe: Tokenizer) -> None:
    text = "hello<|im_end|>"
    assert bpe.encode(text, parse_special=True)[-1] == 1
    assert not {0, 1, 2} & set(bpe.encode(text))
    assert bpe.decode(bpe.encode(text)) == text


def test_user_defined_tokens_always_and_longest_first(bpe: Tokenizer) -> None:
    assert pieces(bpe, bpe.encode("a<tool>\n\nb")) == [b"a", b"<tool>\n", b"\n", b"b"]


def test_control_tokens_keep_off_user_spans(bpe: Tokenizer) -> None:
    text = "<|im_end|><|im_end|>"
    assert bpe.encode_template(text, []) == [1, 1]
    second = bpe.encode_template(text, [(19, 20)])
    assert second[0] == 1
    assert 1 not in second[1:]
    assert bpe.decode(second) == text
    assert bpe.encode_template("<tool>", [(0, 6)]) == bpe.encode("<tool>")


def test_decode_can_leave_out_control_tokens(bpe: Tokenizer) -> None:
    ids = bpe.encode("<|im_start|>hello<tool><|im_end|>", parse_special=True)
    assert bpe.decode(ids) == "<|im_start|>hello<tool><|im_end|>"
    assert bpe.decode(ids, skip_special=True) == "hello<tool>"


def test_bytes_without_a_token_are_dropped_and_do_not_join_their_neighbours(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(tiny.byte_level(tmp_path / "v.gguf", without=(_LETTERS[0xC3],)))
    assert pieces(tokenizer, tokenizer.encode("a\u00e9b")) == [b"a", b"\xa9", b"b"]
    letters = (_LETTERS[0xC3], _LETTERS[0xA9])
    tokenizer = Tokenizer.from_gguf(tiny.byte_level(tmp_path / "w.gguf", without=letters))
    assert pieces(tokenizer, tokenizer.encode("a\u00e9b")) == [b"a", b"b"]


def test_a_merge_without_a_token_falls_apart(tmp_path: Path) -> None:
    path = tiny.byte_level(tmp_path / "v.gguf", merges=["x y", "h e", "h e"])
    tokenizer = Tokenizer.from_gguf(path)
    assert pieces(tokenizer, tokenizer.encode("xyhe")) == [b"x", b"y", b"he"]


def test_a_whole_word_that_is_a_token_is_not_merged(tmp_path: Path) -> None:
    merges = ["h e", "l l"]
    merging = Tokenizer.from_gguf(tiny.byte_level(tmp_path / "a.gguf", merges=merges))
    whole = Tokenizer.from_gguf(tiny.byte_level(tmp_path / "b.gguf", merges=merges, pre="llama-bpe"))
    assert pieces(merging, merging.encode("hello")) == [b"he", b"ll", b"o"]
    assert pieces(whole, whole.encode("hello", add_special=False)) == [b"hello"]


def test_scores_decide_and_the_rest_are_bytes(spm: Tokenizer) -> None:
    assert pieces(spm, spm.encode("hello aaa", add_special=False)) == [b" hello", b" ", b"aa", b"a"]
    assert pieces(spm, spm.encode("\u00e9\u4f60", add_special=False)) == [b" ", b"\xc3\xa9", b"\xe4", b"\xbd", b"\xa0"]


def test_space_in_front_again_after_a_special_token(spm: Tokenizer) -> None:
    ids = spm.encode("hello</s>hello", parse_special=True)
    assert pieces(spm, ids) == [b"<s>", b" hello", b"</s>", b" hello"]
    assert spm.decode(spm.encode("hello", add_special=False)) == "hello"
    assert spm.decode(ids[:2], skip_special=True) == " hello"


def test_no_space_in_front_where_the_file_says_so(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(tiny.sentencepiece(tmp_path / "v.gguf", add_space_prefix=False))
    assert pieces(tokenizer, tokenizer.encode("hello")) == [b"<s>", b"hello"]


def test_text_never_merges_into_a_control_token(tmp_path: Path) -> None:
    words = ["<unk>", "<s>", "</s>", "\u2581", "<", "/", "s", ">", "s>", "</"]
    kinds = [2, 3, 3] + [1] * 7
    path = tiny.sentencepiece(tmp_path / "v.gguf", tokens=words, token_type=kinds, scores=[0.0] * 3 + [-1.0] * 7)
    tokenizer = Tokenizer.from_gguf(path)
    assert pieces(tokenizer, tokenizer.encode("</s>", add_special=False)) == [b" ", b"</", b"s>"]


def test_bos_and_eos_where_the_file_asks(tmp_path: Path) -> None:
    plain = Tokenizer.from_gguf(tiny.byte_level(tmp_path / "a.gguf"))
    both = Tokenizer.from_gguf(tiny.byte_level(tmp_path / "b.gguf", add_bos_token=True, add_eos_token=True))
    assert plain.encode("") == []
    assert both.encode("") == [0, 1]
    assert both.encode("", add_special=False) == []


def test_ends_of_generation_and_where_they_come_from(tmp_path: Path, bpe: Tokenizer) -> None:
    assert dict(bpe.eog_sources) == {1: "tokenizer.ggml.eos_token_id"}
    other = Tokenizer.from_gguf(tiny.byte_level(tmp_path / "v.gguf", eos_token_id=2, eot_token_id=0))
    assert dict(other.eog_sources) == {
        0: "tokenizer.ggml.eot_token_id",
        1: "text <|im_end|>",
        2: "tokenizer.ggml.eos_token_id",
    }
    assert other.eog_ids == {0, 1, 2}


def test_a_token_that_ends_a_generation_is_a_control_token(tmp_path: Path) -> None:
    path = tiny.byte_level(tmp_path / "v.gguf", token_type=None, eos_token_id=None)
    tokenizer = Tokenizer.from_gguf(path)
    assert tokenizer.eos_id is None
    assert tokenizer.eog_ids == {1}
    assert tokenizer.decode([1], skip_special=True) == ""


@pytest.mark.parametrize(
    ("texts", "ends"),
    [
        (["<|return|>", "<|call|>", "<|end|>"], {"<|return|>", "<|call|>"}),
        (["<|return|>", "<|end|>"], {"<|return|>", "<|end|>"}),
        (["<|tool_response>", "</s>"], {"<|tool_response>"}),
        (["<fim_pad>", "<|repo_name|>", "<fim_prefix>"], {"<fim_pad>", "<|repo_name|>"}),
    ],
)
def test_ends_found_by_text(tmp_path: Path, texts: list[str], ends: set[str]) -> None:
    tokens = ["a", *texts]
    path = tiny.byte_level(tmp_path / "v.gguf", tokens=tokens, token_type=None, merges=["a a"], eos_token_id=None)
    tokenizer = Tokenizer.from_gguf(path)
    assert {tokens[token] for token in tokenizer.eog_ids} == ends


def test_an_unknown_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"nobody-knows.*known are"):
        Tokenizer.from_gguf(tiny.byte_level(tmp_path / "v.gguf", model="nobody-knows"))


def test_an_unknown_pre_tokenizer_is_warned_of_and_taken_for_the_default(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unknown = Tokenizer.from_gguf(tiny.byte_level(tmp_path / "a.gguf", pre="nobody-knows"))
    assert "'nobody-knows' is not known" in caplog.text
    default = Tokenizer.from_gguf(tiny.byte_level(tmp_path / "b.gguf", pre="default"))
    text = "hello world, 1234!"
    assert unknown.encode(text) == default.encode(text)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model": None}, "tokenizer.ggml.model"),
        ({"tokens": None}, "tokenizer.ggml.tokens"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens"),
        ({"tokens": ["a", "b", "a"], "token_type": None}, "tokenizer.ggml.tokens"),
        ({"token_type": [1, 1]}, "tokenizer.ggml.token_type"),
        ({"token_type": None, "merges": None}, "tokenizer.ggml.merges"),
        ({"merges": ["h e", "hello"]}, "tokenizer.ggml.merges"),
        ({"merges": ["h "]}, "tokenizer.ggml.merges"),
        ({"bos_token_id": "one"}, "tokenizer.ggml.bos_token_id"),
        ({"bos_token_id": 10**6, "add_bos_token": True}, "tokenizer.ggml.add_bos_token"),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token"),
    ],
)
def test_malformed_vocabularies_name_the_field(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(GGUFError) as caught:
        Tokenizer.from_gguf(tiny.byte_level(tmp_path / "v.gguf", **changes))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"scores": [1.0, 2.0]}, "tokenizer.ggml.scores"),
        ({"scores": [float("nan")] * 300}, "tokenizer.ggml.scores"),
        ({"scores": ["a"] * 300}, "tokenizer.ggml.scores"),
        (
            {"token_type": [2, 3, 3] + [1] * 14 + [6] * 256},
            "tokenizer.ggml.tokens",
        ),  # bytes that are not spelled as bytes
        ({"token_type": [2, 3, 3] + [6] * 200 + [1] * 70}, "tokenizer.ggml.tokens"),  # not all of the bytes
    ],
)
def test_malformed_sentencepiece_vocabularies_name_the_field(
    tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(GGUFError) as caught:
        Tokenizer.from_gguf(tiny.sentencepiece(tmp_path / "v.gguf", **changes))
    assert caught.value.field == field


@pytest.mark.parametrize("which", ["bpe", "spm"])
def test_lone_surrogates_and_ids_out_of_range_are_refused(which: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(which)
    with pytest.raises(RequestError, match=r"character at 2 is a lone surrogate \(U\+D800\)"):
        tokenizer.encode("ab\ud800")
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(RequestError, match=f"token id {token}"):
            tokenizer.decode([token])


@given(TEXT | SPECIAL_TEXT, st.booleans())
def test_bpe_round_trip(bpe: Tokenizer, text: str, parse_special: bool) -> None:
    ids = bpe.encode(text, parse_special=parse_special)
    assert bpe.decode(ids) == text
    assert len(ids) >= bpe.min_tokens_for(len(text.encode()))


@given(TEXT.filter(lambda text: "\u2581" not in text))
def test_spm_round_trip(spm: Tokenizer, text: str) -> None:
    ids = spm.encode(text, add_special=False)
    assert spm.decode(ids) == text
    assert len(ids) >= spm.min_tokens_for(len(text.encode()))


@given(SPECIAL_TEXT, st.data())
def test_spans_only_ever_take_control_tokens_away(bpe: Tokenizer, text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    ids = bpe.encode_template(text, [(start, end)])
    assert bpe.decode(ids) == text
    if end - start == len(text):
        assert ids == bpe.encode(text)
    if start == end:
        assert ids == bpe.encode(text, parse_special=True)


@pytest.mark.parametrize("which", ["bpe", "spm"])
@pytest.mark.parametrize("unit", ["a", "\n", " ", "<|im_end|>", "\u4f60"])
def test_a_megabyte_of_one_thing_does_not_hang(which: str, unit: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(which)
    with at_most_lines(
        2_000_000
    ):  # of Python, up to 14 a byte; in libraries what is quadratic takes an hour for the whole
        tokenizer.encode(unit * (100_000 // len(unit.encode())), parse_special=True)
    text = unit * (1_000_000 // len(unit.encode()))
    ids = tokenizer.encode(text, parse_special=True)
    assert len(ids) >= tokenizer.min_tokens_for(len(text.encode()))


def test_many_threads_get_what_one_gets(bpe: Tokenizer, spm: Tokenizer) -> None:
    texts = [f"hello world {i} <tool> \u00e9" for i in range(50)]
    expected = [(bpe.encode(text), spm.encode(text)) for text in texts]
    wrong: list[str] = []

    def work() -> None:
        wrong.extend(
            text for text, ids in zip(texts, expected, strict=True) if (bpe.encode(text), spm.encode(text)) != ids
        )

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
