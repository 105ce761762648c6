from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.errors import GGUFError
from shoal.gguf.reader import GGUFFile
from tests.support import gguf_builder as build
from tests.support.gguf_builder import GGUFBuilder

Keys = dict[str, tuple[Any, int]]


def part(number: int, count: int, total: int) -> Keys:
    """The keys of part ``number`` (from 0), as llama.cpp writes them."""
    return {
        "split.no": (number, build.UINT16),
        "split.count": (count, build.UINT16),
        "split.tensors.count": (total, build.INT32),
    }


def write_part(folder: Path, name: str, keys: Keys, tensor: str, value: float) -> Path:
    builder = GGUFBuilder()
    if name.endswith("-00001-of-00003.gguf"):
        builder.add("general.architecture", "llama")
    for key, (content, type_id) in keys.items():
        builder.add(key, content, type_id)
    builder.add_tensor(tensor, np.full(8, value, dtype=np.float32))
    return builder.write(folder / name)


def write_model(folder: Path, *, change: tuple[int, Keys | None] | None = None) -> Path:
    """A model in three parts, one of which may have other keys, or (None) be left out. Returns the first part."""
    for i in range(3):
        keys: Keys | None = part(i, 3, 3)
        if change is not None and change[0] == i:
            keys = None if change[1] is None else {**part(i, 3, 3), **change[1]}
        if keys is not None:
            write_part(folder, f"m-{i + 1:05d}-of-00003.gguf", keys, f"t{i}", float(i))
    return folder / "m-00001-of-00003.gguf"


def test_all_parts_open_as_one_file(tmp_path: Path) -> None:
    first = write_model(tmp_path)
    with GGUFFile.open(first) as file:
        assert file.path == first
        assert file.get("general.architecture", str) == "llama"
        assert [(t.name, t.part) for t in file.tensors.values()] == [("t0", 0), ("t1", 1), ("t2", 2)]
        for i in range(3):
            assert file.tensor(f"t{i}").view("<f4").tolist() == [float(i)] * 8
            file.release(f"t{i}")
        assert file.file_size == sum(p.stat().st_size for p in tmp_path.iterdir())
        assert file.check_tensors() == []


def test_errors_name_the_part(tmp_path: Path) -> None:
    with GGUFFile.open(write_model(tmp_path)) as file:
        assert file.error("t2", "odd").path == tmp_path / "m-00003-of-00003.gguf"
    write_part(tmp_path, "m-00002-of-00003.gguf", part(1, 3, 3), "t1", np.inf)
    with GGUFFile.open(tmp_path / "m-00001-of-00003.gguf") as file:
        assert [e.path for e in file.check_tensors()] == [tmp_path / "m-00002-of-00003.gguf"]


def test_a_split_of_one_is_no_split(tmp_path: Path) -> None:
    with GGUFFile.open(write_part(tmp_path, "plain.gguf", part(0, 1, 1), "t", 1.0)) as file:
        assert list(file.tensors) == ["t"]


@pytest.mark.parametrize("number", [2, 3])
def test_another_part_names_the_first(tmp_path: Path, number: int) -> None:
    write_model(tmp_path)
    with pytest.raises(GGUFError, match=r"open m-00001-of-00003.gguf") as caught:
        GGUFFile.open(tmp_path / f"m-{number:05d}-of-00003.gguf")
    assert caught.value.field == "split.no"


@pytest.mark.parametrize(
    ("change", "field", "reason", "at"),
    [
        ((1, None), "split.count", "is 3, but part m-00002-of-00003.gguf is missing", 1),
        ((0, {"split.no": (1, build.UINT16)}), "split.no", "is 1, should be 0", 1),
        ((2, {"split.no": (1, build.UINT16)}), "split.no", "is 1, should be 2", 3),
        ((1, {"split.count": (4, build.UINT16)}), "split.count", "is 4, should be 3", 2),
        ((1, {"split.count": ("3", build.STRING)}), "split.count", "not an integer", 2),
        ((0, {"split.count": (4, build.UINT16)}), "split.count", "not named *-00001-of-00004.gguf", 1),
        ((0, {"split.count": (True, build.BOOL)}), "split.count", "not an integer", 1),
        ((0, {"split.tensors.count": (4, build.INT32)}), "split.tensors.count", "is 4, should be 3", 1),
    ],
)
def test_parts_that_do_not_belong_together(
    tmp_path: Path, change: tuple[int, Keys | None], field: str, reason: str, at: int
) -> None:
    first = write_model(tmp_path, change=change)
    with pytest.raises(GGUFError) as caught:
        GGUFFile.open(first)
    assert caught.value.field == field
    assert reason in caught.value.reason
    assert caught.value.path == tmp_path / f"m-{at:05d}-of-00003.gguf"


def test_a_part_without_split_keys(tmp_path: Path) -> None:
    first = write_model(tmp_path)
    write_part(tmp_path, "m-00002-of-00003.gguf", {}, "t1", 1.0)
    with pytest.raises(GGUFError, match=r"split.no at byte .*: missing"):
        GGUFFile.open(first)


def test_a_name_that_does_not_say_which_part_it_is(tmp_path: Path) -> None:
    path = write_model(tmp_path).rename(tmp_path / "model.gguf")
    with pytest.raises(GGUFError, match="not named"):
        GGUFFile.open(path)


def test_a_broken_part_is_refused_like_any_file(tmp_path: Path) -> None:
    first = write_model(tmp_path)
    second = tmp_path / "m-00002-of-00003.gguf"
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(GGUFError, match=r"m-00002-of-00003.gguf: tensor 't1' offset"):
        GGUFFile.open(first)


def test_a_tensor_in_two_parts(tmp_path: Path) -> None:
    first = write_model(tmp_path)
    write_part(tmp_path, "m-00003-of-00003.gguf", part(2, 3, 3), "t1", 1.0)
    with pytest.raises(GGUFError, match=r"duplicate name, also in m-00002-of-00003.gguf"):
        GGUFFile.open(first)
