"""Token ids, text, special ids and rendered templates against llama.cpp's and transformers' (golden data)."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import TemplateError
from shoal.gguf.reader import GGUFFile
from shoal.text.chat import ChatTemplate
from shoal.text.pretokenizers import PRE_TOKENIZERS
from shoal.text.tokenizer import Tokenizer
from shoal.text.vocab import Kind

MODELS = ("smollm2", "gemma3")
VOCABULARIES = ("llama-spm", "phi-3", "gpt-2", "starcoder", "deepseek-llm", "qwen2", "llama-bpe")
SEPARATOR = "\n__ggml_vocab_test__\n"
PROBE_DIGESTS = Path(__file__).with_name("probe_digests.json")


def records(path: Path) -> Iterator[dict[str, Any]]:
    yield from map(json.loads, path.read_text("ascii").splitlines())


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("ascii"))


class Model:
    """A real model's tokenizer and its golden data."""

    def __init__(self, name: str, path: Path, folder: Path) -> None:
        self.name = name
        self.path = path
        self.folder = folder
        self.tokenizer = Tokenizer.from_gguf(path)

    def records(self, kind: str) -> Iterator[dict[str, Any]]:
        return records(self.folder / f"{self.name}.{kind}.jsonl")


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, golden: Path) -> Model:
    return Model(request.param, request.getfixturevalue(f"{request.param}_path"), golden / "models")


@pytest.fixture(scope="module", params=VOCABULARIES)
def vocabulary(request: pytest.FixtureRequest, golden: Path) -> tuple[Path, Tokenizer, dict[str, Any]]:
    """A vocabulary-only file, its tokenizer, and its special ids as llama.cpp resolves them."""
    path = golden / "tokenizers" / f"ggml-vocab-{request.param}.gguf"
    if not path.exists():
        pytest.skip(f"{path.name} may not be shipped; see the golden data's README on how to rebuild it")
    expected = read_json(golden / "tokenizers" / "vocabs.json")[request.param]
    return path, Tokenizer.from_gguf(path), expected


def test_model_ids_in_all_four_flag_combinations(model: Model) -> None:
    wrong = [
        (record["text"], record["add_special"], record["parse_special"])
        for record in model.records("tokenizer")
        if model.tokenizer.encode(record["text"], record["add_special"], record["parse_special"]) != record["ids"]
    ]
    assert wrong == []


@pytest.mark.parametrize(("key", "skip_special"), [("detok", False), ("detok_plain", True)])
def test_model_text(model: Model, key: str, skip_special: bool) -> None:
    for record in model.records("tokenizer"):
        raw = bytes.fromhex(record[f"{key}_hex"]) if f"{key}_hex" in record else record[key].encode()
        assert model.tokenizer.decode_bytes(record["ids"], skip_special) == raw
        assert model.tokenizer.decode(record["ids"], skip_special) == raw.decode("utf-8", "replace")


def test_model_streams_what_decode_gives(model: Model) -> None:
    for record in model.records("tokenizer"):
        stream = model.tokenizer.stream(skip_special=False)
        text = "".join(map(stream.push, record["ids"])) + stream.flush()
        assert text == model.tokenizer.decode(record["ids"])


def test_model_special_ids(model: Model) -> None:
    expected = read_json(model.folder / f"{model.name}.vocab.json")
    assert model.tokenizer.vocab_size == expected["n_vocab"]
    assert (model.tokenizer.bos_id, model.tokenizer.eos_id) == (expected["bos"], expected["eos"])
    assert sorted(model.tokenizer.eog_ids) == expected["eog"]


def test_model_pieces(model: Model) -> None:
    with gzip.open(model.folder / f"{model.name}.pieces.tsv.gz", "rt", encoding="ascii", newline="\n") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    for token, kind, _, piece, shown in rows:
        assert model.tokenizer.token_bytes(int(token)) == bytes.fromhex(piece)
        stream = model.tokenizer.stream(skip_special=True)
        if shown != "=" or int(kind) == Kind.CONTROL:
            assert (stream.push(int(token)) + stream.flush()).encode() == bytes.fromhex(shown.replace("=", piece))


@pytest.fixture(scope="module")
def chat(model: Model) -> Iterator[ChatTemplate]:
    source = (model.folder / f"{model.name}.chat_template.jinja").read_bytes().decode()
    with GGUFFile.open(model.path) as file:
        embedded = ChatTemplate.from_gguf(file)
        template = embedded or ChatTemplate.from_gguf(file, source)
    assert template is not None
    assert embedded is None or embedded.source == source
    yield template
    template.close()


def test_chat_renderings(model: Model, chat: ChatTemplate) -> None:
    for record in model.records("chat"):
        if "error" in record:
            with pytest.raises(TemplateError) as caught:
                chat.render(record["messages"], record["add_generation_prompt"])
            assert record["error"].split(": ", 1)[1] in str(caught.value)
        else:
            assert chat.render(record["messages"], record["add_generation_prompt"]) == record["prompt"]


def test_chat_ids(model: Model, chat: ChatTemplate) -> None:
    """Equal to those of the whole prompt, except that forged control tokens stay text."""
    for record in model.records("chat"):
        if "error" in record:
            continue
        ids = chat.encode(model.tokenizer, record["messages"], record["add_generation_prompt"])
        assert (ids == record["ids"]) == (record["id"] != "special-text"), record["id"]
        assert model.tokenizer.decode(ids) == record["prompt"]


def test_vocabulary_strings(vocabulary: tuple[Path, Tokenizer, dict[str, Any]]) -> None:
    path, tokenizer, _ = vocabulary
    texts = Path(f"{path}.inp").read_bytes().decode().split(SEPARATOR)[:-1]
    lines = Path(f"{path}.out").read_text("ascii").split("\n")
    for text, line in zip(texts, lines[: len(texts)], strict=True):
        assert tokenizer.encode(text, add_special=False) == list(map(int, line.split()))


def test_more_vocabulary_strings(vocabulary: tuple[Path, Tokenizer, dict[str, Any]]) -> None:
    path, tokenizer, _ = vocabulary
    name = path.stem.removeprefix("ggml-vocab-")
    for record in records(path.with_name(f"{name}.jsonl")):
        text = record["text"]
        assert tokenizer.encode(text, add_special=False) == record["ids"]
        assert tokenizer.encode(text, parse_special=True) == record["ids_special"]
        expected = bytes.fromhex(record["detok_hex"]) if "detok_hex" in record else record.get("detok", text).encode()
        decoded = tokenizer.decode_bytes(record["ids"])
        assert expected in (decoded, cleaned_up(decoded))


def cleaned_up(text: bytes) -> bytes:
    """What llama_detokenize does to the text of many vocabularies, and shoal (like llama.cpp's own server) does not."""
    text = re.sub(rb" (?=[?!.,])", b"", text).replace(b" ' ", b"'")
    return re.sub(rb" (?='(?:s|m|re|ve))", b"", text)


def test_vocabulary_special_ids(vocabulary: tuple[Path, Tokenizer, dict[str, Any]]) -> None:
    _, tokenizer, expected = vocabulary
    assert (tokenizer.bos_id, tokenizer.eos_id) == (expected["bos"], expected["eos"])
    assert sorted(tokenizer.eog_ids) == expected["eog"]
    assert tokenizer.encode("") == [expected["bos"]] * expected["add_bos"]


def test_every_pre_tokenizer_has_a_digest() -> None:
    digested = [name for names in read_json(PROBE_DIGESTS).values() for name in names]
    assert sorted(digested) == sorted(name for name, row in PRE_TOKENIZERS.items() if row.bytewise)


def probe_tokenizer(golden: Path, pre: str) -> Tokenizer:
    """The vocabulary that shows every cut, with another pre-tokenizer."""
    with GGUFFile.open(golden / "tokenizers" / "probe.gguf") as file:
        file.metadata = {**file.metadata, "tokenizer.ggml.pre": pre}
        return Tokenizer.from_gguf(file)


@pytest.mark.parametrize(("digest", "names"), read_json(PROBE_DIGESTS).items())
def test_pre_tokenizers_cut_as_llama_cpp_does(golden: Path, digest: str, names: list[str]) -> None:
    """``digest``: SHA-256, 16 digits of it, over the JSON of llama.cpp's ids of all probe strings, in order."""
    texts = [record["text"] for record in records(golden / "tokenizers" / "probe.jsonl")]
    for name in names:
        tokenizer = probe_tokenizer(golden, name)
        ids = [tokenizer.encode(text, add_special=False) for text in texts]
        assert sha256(json.dumps(ids, separators=(",", ":")).encode()).hexdigest()[:16] == digest, name


def test_probe_strings(golden: Path) -> None:
    cases = [
        (name, record["text"], case["ids"])
        for record in records(golden / "tokenizers" / "probe.jsonl")
        for case in record["cases"]
        for name in case["pre"]
    ]
    tokenizers = {name: probe_tokenizer(golden, name) for name in {name for name, _, _ in cases}}
    wrong = [(name, text) for name, text, ids in cases if tokenizers[name].encode(text, add_special=False) != ids]
    assert wrong == []
    assert len(tokenizers) == 20
