"""Fingerprints of inputs and models."""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path

import msgspec
import numpy as np
import pytest

from shoal.errors import GGUFError, JobError, ModelNotFoundError
from shoal.gguf.reader import GGUFFile
from shoal.jobs.durable.fingerprint import file_fingerprint, files_fingerprint, model_fingerprint
from tests.support.gguf_builder import GGUFBuilder


def test_a_file_is_known_by_its_whole_content(tmp_path: Path) -> None:
    content = os.urandom((2 << 20) + 5)
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    assert file_fingerprint(path) == {
        "path": str(path),
        "bytes": len(content),
        "blake2b": blake2b(content, digest_size=16).hexdigest(),
    }


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert file_fingerprint(Path("in.jsonl")) == file_fingerprint(tmp_path / "in.jsonl")


def test_a_name_that_is_not_utf8_can_be_written_down(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"in\xff.jsonl")
    path.write_bytes(b"x")
    found = file_fingerprint(path)
    assert str(found["path"]).endswith("in\\xff.jsonl")
    assert msgspec.json.decode(msgspec.json.encode(found)) == found


@pytest.mark.parametrize("name", [".", "absent"], ids=["folder", "absent"])
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(JobError, match=str(tmp_path / name)):
        file_fingerprint(tmp_path / name)


def test_of_several_files_all_that_is_said_counts_and_their_order() -> None:
    files = [("a", 1, "x"), ("b", 2, "y")]
    found = files_fingerprint("in", iter(files))
    assert found == {"path": "in", "files": 2, "bytes": 3, "blake2b": found["blake2b"]}
    others = [
        files[::-1],
        files[:1],
        [("c", 1, "x"), files[1]],
        [("a", 1, "x"), ("b", 1, "y")],
        [files[0], ("b", 2, "z")],
    ]
    assert len({files_fingerprint("in", each)["blake2b"] for each in [files, *others]}) == 6


def write_model(path: Path, rows: int, key: str = "value") -> Path:
    """A model with ``rows`` rows of 4 KiB."""
    builder = GGUFBuilder()
    builder.add("general.name", key)
    builder.add_tensor("t", np.zeros((rows, 1024), dtype=np.float32))
    return builder.write(path)


def data_start(path: Path) -> int:
    with GGUFFile.open(path) as file:
        return file.tensors["t"].offset


def with_byte(path: Path, offset: int, value: int) -> Path:
    """A copy of a file with one byte changed."""
    content = bytearray(path.read_bytes())
    assert content[offset] != value
    content[offset] = value
    copy = path.with_name(f"changed-{offset}.gguf")
    copy.write_bytes(content)
    return copy


def test_the_name_of_a_model_is_no_part_of_it(tmp_path: Path) -> None:
    first, second = write_model(tmp_path / "a.gguf", 2), write_model(tmp_path / "b.gguf", 2)
    assert model_fingerprint(first) == model_fingerprint(second)
    assert model_fingerprint(first)["bytes"] == first.stat().st_size


def test_every_byte_of_a_small_model_counts(tmp_path: Path) -> None:
    path = write_model(tmp_path / "a.gguf", 256)
    size = path.stat().st_size
    end_of_header = data_start(path)
    values = {model_fingerprint(path)["blake2b"]}
    places = [end_of_header, end_of_header + 4096, end_of_header + 12345, size - 4097, size - 1]
    values.update(model_fingerprint(with_byte(path, place, 7))["blake2b"] for place in places)
    assert len(values) == 1 + len(places)


def test_the_header_counts(tmp_path: Path) -> None:
    first, second = write_model(tmp_path / "a.gguf", 2, "value"), write_model(tmp_path / "b.gguf", 2, "other")
    assert first.stat().st_size == second.stat().st_size
    assert model_fingerprint(first) != model_fingerprint(second)


def test_samples_of_a_large_model_count(tmp_path: Path) -> None:
    """Of 511 pages every other one is a sample, from the first to the last."""
    path = write_model(tmp_path / "a.gguf", 511)
    start = data_start(path)
    found = model_fingerprint(path)
    for page in (0, 2, 254, 508, 510):
        for place in (start + 4096 * page, start + 4096 * page + 4095):
            assert model_fingerprint(with_byte(path, place, 7)) != found
    assert model_fingerprint(with_byte(path, start + 4096, 7)) == found


def test_bytes_at_the_end_count(tmp_path: Path) -> None:
    path = write_model(tmp_path / "a.gguf", 2)
    found = model_fingerprint(path)
    with path.open("ab") as file:
        file.write(b"\0")
    assert model_fingerprint(path)["blake2b"] != found["blake2b"]


def write_part(folder: Path, number: int, value: float) -> None:
    builder = GGUFBuilder()
    builder.add("split.no", number)
    builder.add("split.count", 2)
    builder.add_tensor(f"t{number}", np.full(64, value, dtype=np.float32))
    builder.write(folder / f"m-{number + 1:05d}-of-00002.gguf")


def test_all_parts_of_a_split_model_count(tmp_path: Path) -> None:
    values = set()
    for first, second in ((1.0, 2.0), (1.0, 3.0), (4.0, 2.0)):
        write_part(tmp_path, 0, first)
        write_part(tmp_path, 1, second)
        found = model_fingerprint(tmp_path / "m-00001-of-00002.gguf")
        assert found["bytes"] == sum(path.stat().st_size for path in tmp_path.iterdir())
        values.add(found["blake2b"])
    assert len(values) == 3


def test_a_model_without_weights(tmp_path: Path) -> None:
    values = set()
    for name in ("one", "two"):
        builder = GGUFBuilder()
        builder.add("general.name", name)
        values.add(model_fingerprint(builder.write(tmp_path / name))["blake2b"])
    assert len(values) == 2


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"no model")
    with pytest.raises(GGUFError):
        model_fingerprint(tmp_path / "a.gguf")
    with pytest.raises(ModelNotFoundError):
        model_fingerprint(tmp_path / "absent.gguf")
