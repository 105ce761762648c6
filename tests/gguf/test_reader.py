from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gguf
from shoal.errors import GGUFError, ModelNotFoundError
from shoal.gguf.quants import DEQUANTISABLE, dequantise, format_named
from shoal.gguf.reader import GGUFFile, StringArray
from tests.support import gguf_builder as build
from tests.support.effort import at_most_lines
from tests.support.gguf_builder import GGUFBuilder, random_rows

SCALARS: dict[int, list[Any]] = {
    build.UINT8: [0, 255],
    build.INT8: [-128, 127],
    build.UINT16: [0, 65535],
    build.INT16: [-32768, 32767],
    build.UINT32: [0, 2**32 - 1],
    build.INT32: [-(2**31), 2**31 - 1],
    build.UINT64: [0, 2**64 - 1],
    build.INT64: [-(2**63), 2**63 - 1],
    build.FLOAT32: [0.5, -math.inf],
    build.FLOAT64: [0.1, 1e300],
    build.BOOL: [True, False],
    build.STRING: ["", "naïve ▁ 🐟"],
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file with a few keys and one tensor of each decodable format that the gguf package knows too."""
    rng = np.random.default_rng(0)
    builder = GGUFBuilder()
    builder.add("general.architecture", "llama")
    builder.add("llama.block_count", 2)
    builder.add("llama.eps", 1e-5)
    builder.add("flag", True)
    builder.add("tokens", ["a", "bc", ""])
    builder.add("scores", [0.5, -1.0])
    for name in sorted(DEQUANTISABLE - {"I2_S"}):
        builder.add_random_tensor(f"{name}.weight", (3, 512), name, rng)
    builder.add_tensor("norm", np.arange(7, dtype=np.float32))
    return builder.write(tmp_path / "small.gguf")


@pytest.mark.parametrize("type_id", SCALARS)
def test_scalars_and_arrays_of_every_type(type_id: int, tmp_path: Path) -> None:
    values = SCALARS[type_id]
    builder = GGUFBuilder()
    for i, value in enumerate(values):
        builder.add(f"scalar{i}", value, type_id)
    builder.add("array", values, type_id)
    builder.add("empty", [], type_id)
    with GGUFFile.open(builder.write(tmp_path / "m.gguf")) as file:
        scalars = [file.metadata[f"scalar{i}"] for i in range(len(values))]
        assert scalars == values
        assert [type(s) for s in scalars] == [type(v) for v in values]
        assert file.metadata["array"].tolist() == values
        assert len(file.metadata["empty"]) == 0


def test_number_arrays_are_read_only(small: Path) -> None:
    with GGUFFile.open(small) as file, pytest.raises(ValueError, match="read-only"):
        file.metadata["scores"][0] = 1.0


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 8, 32, 4096])
def test_versions_and_alignments(version: int, alignment: int, tmp_path: Path) -> None:
    builder = GGUFBuilder(version=version, alignment=alignment)
    data = [np.arange(n, dtype=np.float32) for n in (3, 5)]
    for i, values in enumerate(data):
        builder.add_tensor(f"t{i}", values)
    with GGUFFile.open(builder.write(tmp_path / "m.gguf")) as file:
        assert (file.version, file.alignment) == (version, alignment)
        for i, values in enumerate(data):
            assert file.tensors[f"t{i}"].offset % alignment == 0
            assert file.tensor(f"t{i}").tobytes() == values.tobytes()


def test_tensors_are_views_in_rows_first_order(small: Path) -> None:
    with GGUFFile.open(small) as file:
        info = file.tensors["Q4_K.weight"]
        view = file.tensor("Q4_K.weight")
        assert (info.format.name, info.shape, info.nbytes) == ("Q4_K", (3, 512), 3 * 2 * 144)
        assert view.shape == (3, 288)
        assert not view.flags.writeable
        assert view.base is not None
        assert view.tobytes() == small.read_bytes()[info.offset : info.offset + info.nbytes]
        assert file.tensor("norm").shape == (28,)
        assert dequantise(file.tensors["norm"].format, file.tensor("norm")).tolist() == list(range(7))


def test_tensors_of_more_dimensions(tmp_path: Path) -> None:
    builder = GGUFBuilder()
    data = random_rows(format_named("Q8_0"), (2, 3, 4, 64), np.random.default_rng(0))
    builder.add_tensor("experts", data, "Q8_0")
    with GGUFFile.open(builder.write(tmp_path / "m.gguf")) as file:
        assert file.tensors["experts"].shape == (2, 3, 4, 64)
        assert np.array_equal(file.tensor("experts"), data)


def test_the_scale_of_a_tensor_stands_behind_its_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [random_rows(format_named("I2_S"), (n, 256), rng) for n in (3, 1)]
    builder = GGUFBuilder()
    builder.add_tensor("a", rows[0], "I2_S", 0.25)
    builder.add_tensor("b", rows[1], "I2_S", -3.0)
    builder.add_random_tensor("c", (3, 256), "Q4_K", rng)
    with GGUFFile.open(builder.write(tmp_path / "m.gguf")) as file:
        assert (file.tensors["a"].shape, file.tensors["a"].nbytes) == ((3, 256), 3 * 64 + 32)
        assert [file.scale(name) for name in "abc"] == [0.25, -3.0, 1.0]
        assert np.array_equal(file.tensor("a"), rows[0])
        assert np.array_equal(file.tensor("b"), rows[1])
        assert file.check_tensors() == []


def test_i2_s_rows_are_whole_blocks_and_have_their_tail(tmp_path: Path) -> None:
    odd, cut = GGUFBuilder(), GGUFBuilder()
    odd.add_raw_tensor("w", (192, 2), 36, bytes(2 * 48 + 32))
    cut.add_raw_tensor("w", (256, 2), 36, bytes(2 * 64))
    with pytest.raises(GGUFError, match="rows of 192 numbers are not a multiple of I2_S's block of 128"):
        GGUFFile.open(odd.write(tmp_path / "odd.gguf"))
    with pytest.raises(GGUFError, match="data ends at byte"):
        GGUFFile.open(cut.write(tmp_path / "cut.gguf"))


def test_file_without_tensors_or_keys(tmp_path: Path) -> None:
    with GGUFFile.open(GGUFBuilder().write(tmp_path / "m.gguf")) as file:
        assert (dict(file.metadata), dict(file.tensors), file.file_size) == ({}, {}, 24)


def test_get_is_typed(small: Path) -> None:
    with GGUFFile.open(small) as file:
        assert file.get("llama.block_count", int) == 2
        assert file.get("llama.eps", float) == pytest.approx(1e-5)
        assert file.get("flag", bool) is True
        assert file.get("tokens", StringArray).tolist() == ["a", "bc", ""]
        assert file.get("scores", np.ndarray).tolist() == [0.5, -1.0]
        assert file.get("absent", int, default=7) == 7
        assert file.get("absent", str, default=None) is None


@pytest.mark.parametrize(
    ("key", "kind", "reason"),
    [
        ("absent", int, "missing"),
        ("flag", int, "bool, must be int"),
        ("llama.block_count", bool, "int, must be bool"),
        ("llama.eps", int, "float, must be int"),
        ("llama.block_count", float, "int, must be float"),
        ("general.architecture", int, "str, must be int"),
        ("tokens", str, "StringArray, must be str"),
        ("scores", StringArray, "ndarray, must be StringArray"),
    ],
)
def test_get_names_the_key_and_where_it_stands(small: Path, key: str, kind: type, reason: str) -> None:
    with GGUFFile.open(small) as file, pytest.raises(GGUFError) as caught:
        file.get(key, kind)
    assert (caught.value.field, caught.value.reason) == (key, reason)
    if key != "absent":
        raw = small.read_bytes()
        assert raw[: caught.value.offset].endswith(key.encode())


def odd(tmp_path: Path) -> Path:
    """A file in which much is not what GGUF says, and nothing out of reach of those who do not ask for it."""
    builder = GGUFBuilder()
    builder.add_raw("general.description", build.STRING, build.string("Mod\xe8le".encode("latin-1")))
    builder.add_raw(b"gr\xf6\xdfe", build.STRING, build.string(b"1"))
    builder.add_raw(b"gr\xf6\xdf", build.UINT8, b"\1")
    builder.add_raw("flag", build.BOOL, b"\x02")
    builder.add_raw("flags", build.ARRAY, struct.pack("<IQ", build.BOOL, 3) + b"\0\1\xff")
    builder.add("general.name", "caf\u00e9")
    builder.add_raw_tensor(b"w\xff", (8,), 0, bytes(32))
    return builder.write(tmp_path / "odd.gguf")


def test_what_nothing_asks_for_may_be_odd(tmp_path: Path) -> None:
    with GGUFFile.open(odd(tmp_path)) as file:
        assert file.get("general.name", str) == "caf\u00e9"
        assert file.metadata["general.description"] == b"Mod\xe8le"
        assert [file.metadata[name] for name in ("gr\udcf6\udcdfe", "gr\udcf6\udcdf", "flag")] == ["1", 1, 2]
        assert file.metadata["flags"].tolist() == [0, 1, 255]
        assert list(file.tensors) == ["w\udcff"]


def test_what_is_asked_for_is_judged_and_named(tmp_path: Path) -> None:
    path = odd(tmp_path)
    with GGUFFile.open(path) as file:
        with pytest.raises(GGUFError, match=r"general\.description at byte .*: not UTF-8: .* at its byte 3") as caught:
            file.get("general.description", str, default="")
        assert path.read_bytes()[: caught.value.offset].endswith(b"general.description")
        with pytest.raises(GGUFError, match=r"flag at byte .*: int, must be bool"):
            file.get("flag", bool)
        assert str(file.error("w\udcff", "is odd")).endswith("is odd")
        assert str(file.error("w\udcff", "is odd")).isprintable()


def test_a_label_is_shown_whatever_it_holds(tmp_path: Path) -> None:
    with GGUFFile.open(odd(tmp_path)) as file:
        assert [file.label(key) for key in ("general.name", "general.description", "flag", "absent")] == [
            "caf\u00e9",
            "Mod\ufffdle",
            "",
            "",
        ]


def test_a_default_does_not_excuse_a_wrong_type(small: Path) -> None:
    with GGUFFile.open(small) as file, pytest.raises(GGUFError, match=r"llama\.eps"):
        file.get("llama.eps", int, default=1)


def test_errors_about_tensors_point_at_the_table(small: Path) -> None:
    with GGUFFile.open(small) as file:
        error = file.error("norm", "is odd")
    assert error.field == "tensor 'norm'"
    assert small.read_bytes()[error.offset :].startswith(build.string(b"norm"))


def test_string_array(tmp_path: Path) -> None:
    words = ["", "fish", "▁the", "🐟" * 40, "x" * 70000]
    builder = GGUFBuilder()
    builder.add("words", words)
    with GGUFFile.open(builder.write(tmp_path / "m.gguf")) as file:
        array = file.get("words", StringArray)
        assert len(array) == 5
        assert list(array) == array.tolist() == words
        assert (array[1], array[-1], array[1:3], array[::-2]) == (words[1], words[-1], words[1:3], words[::-2])
        assert array.bytes_list() == [w.encode() for w in words]
        assert "fish" in array
        for outside in (5, -6):
            with pytest.raises(IndexError):
                array[outside]


def test_invalid_utf8_in_a_string_array_is_found_when_decoded(tmp_path: Path) -> None:
    builder = GGUFBuilder()
    builder.add("words", [b"ok", b"\xff\xfe"], build.STRING)
    path = builder.write(tmp_path / "m.gguf")
    with GGUFFile.open(path) as file:
        array = file.get("words", StringArray)
        assert array[0] == "ok"
        assert array.bytes_list() == [b"ok", b"\xff\xfe"]
        with pytest.raises(GGUFError, match="string 1 is not UTF-8") as caught:
            array.tolist()
        assert path.read_bytes()[caught.value.offset :].startswith(b"\xff\xfe")
        with pytest.raises(GGUFError, match="string 1 is not UTF-8"):
            array[-1]


def test_views_outlive_the_file(small: Path) -> None:
    file = GGUFFile.open(small)
    view, words = file.tensor("norm"), file.get("tokens", StringArray)
    file.close()
    file.close()
    assert view.view("<f4").tolist() == list(range(7))
    assert words.tolist() == ["a", "bc", ""]
    for call in (file.tensor, file.release):
        with pytest.raises(ValueError, match="closed"):
            call("norm")


def test_closing_returns_the_file_handle(small: Path) -> None:
    process = psutil.Process()
    GGUFFile.open(small).close()
    before = process.num_fds()
    for _ in range(10):
        GGUFFile.open(small).close()
    assert process.num_fds() == before


def test_unknown_tensor(small: Path) -> None:
    with GGUFFile.open(small) as file, pytest.raises(KeyError, match="nothing"):
        file.tensor("nothing")


def resident(path: Path) -> int:
    """Bytes of a file that are mapped into this process and in memory (the system maps some around each page read)."""
    return sum(m.rss for m in psutil.Process().memory_maps() if m.path == str(path))


def test_release_lets_the_pages_go(tmp_path: Path) -> None:
    builder = GGUFBuilder()
    builder.add_tensor("big", np.ones((2048, 2048), dtype=np.float32))
    path = builder.write(tmp_path / "m.gguf")
    with GGUFFile.open(path) as file:
        assert resident(path) < 4 << 20
        assert file.tensor("big").sum() > 0
        assert resident(path) > 15 << 20
        file.release("big")
        assert resident(path) < 4 << 20
        assert file.tensor("big")[-1].view("<f4").tolist() == [1.0] * 2048


def test_check_tensors_finds_nan_and_infinity(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    builder = GGUFBuilder()
    builder.add_random_tensor("good", (4, 256), "Q4_K", rng)
    rows = random_rows(format_named("Q4_1"), (4, 64), rng)
    rows[1, 20:22] = (0x00, 0x7C)  # the scale of the fourth block
    rows[3, 2:4] = (0x01, 0x7E)  # the minimum of the seventh
    builder.add_tensor("bad", rows, "Q4_1")
    builder.add_tensor("nan", np.array([0, 1, np.nan], dtype=np.float32))
    builder.add_tensor("whole", random_rows(format_named("I2_S"), (4, 128), rng), "I2_S", np.inf)
    with GGUFFile.open(builder.write(tmp_path / "m.gguf")) as file:
        errors = file.check_tensors()
        assert [(e.field, e.reason) for e in errors] == [
            ("tensor 'bad'", "2 of 8 block scales are NaN or Inf"),
            ("tensor 'nan'", "1 of 3 values are NaN or Inf"),
            ("tensor 'whole'", "the scale of the tensor is inf"),
        ]
        faults = {"bad": 60, "nan": 8, "whole": 4 * 32}
        assert [e.offset for e in errors] == [file.tensors[name].offset + at for name, at in faults.items()]


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.gguf", Path("/dev/zero"), tmp_path / ("x" * 5000)):
        with pytest.raises(ModelNotFoundError, match=r"file|name too long"):
            GGUFFile.open(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelNotFoundError, match="not a regular file"):
        GGUFFile.open(tmp_path / "pipe")


# Round trips of random files

KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda k: k != "general.alignment" and not k.startswith("split.")  # hypothesis tries strings that it finds in src
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def integers(bits: int, signed: bool) -> st.SearchStrategy[int]:
    return st.integers(-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else st.integers(0, (1 << bits) - 1)


BY_TYPE: dict[int, st.SearchStrategy[Any]] = {
    build.UINT8: integers(8, False),
    build.INT8: integers(8, True),
    build.UINT16: integers(16, False),
    build.INT16: integers(16, True),
    build.UINT32: integers(32, False),
    build.INT32: integers(32, True),
    build.UINT64: integers(64, False),
    build.INT64: integers(64, True),
    build.FLOAT32: st.floats(width=32, allow_nan=False),
    build.FLOAT64: st.floats(allow_nan=False),
    build.BOOL: st.booleans(),
    build.STRING: TEXTS,
}
VALUES = st.sampled_from(sorted(BY_TYPE)).flatmap(
    lambda t: st.tuples(st.just(t), st.one_of(BY_TYPE[t], st.lists(BY_TYPE[t], max_size=5)))
)
TENSORS = st.lists(
    st.tuples(TEXTS, st.sampled_from(sorted(DEQUANTISABLE)), st.lists(st.integers(1, 3), min_size=1, max_size=4)),
    max_size=5,
    unique_by=lambda t: t[0],
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(KEYS, VALUES, max_size=8), TENSORS, st.sampled_from([1, 16, 32, 64]), st.integers(0, 2**32 - 1))
def test_round_trip(
    tmp_path: Path,
    metadata: dict[str, tuple[int, Any]],
    tensors: list[tuple[str, str, list[int]]],
    alignment: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    builder = GGUFBuilder(alignment=alignment)
    for key, (type_id, value) in metadata.items():
        builder.add(key, value, type_id)
    rows = {name: random_rows(format_named(f), (*dims[:-1], dims[-1] * 256), rng) for name, f, dims in tensors}
    for name, fmt, _ in tensors:
        builder.add_tensor(name, rows[name], fmt)
    with GGUFFile.open(builder.write(tmp_path / "m.gguf")) as file:
        values = {k: v for k, v in file.metadata.items() if k != "general.alignment"}
        assert list(values) == list(metadata)
        for key, (_, value) in metadata.items():
            got = values[key].tolist() if isinstance(value, list) else values[key]
            assert got == value
        assert list(file.tensors) == list(rows)
        for name in rows:
            assert np.array_equal(file.tensor(name), rows[name])


# Against the gguf package


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_rope_freq_base(10000.0)
    writer.add_token_list(["<s>", "▁a"])
    writer.add_array("merges", [1, -2, 3])
    weights = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    packed = gguf.quantize(weights, gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("w", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("norm", weights[0])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with GGUFFile.open(path) as file:
        assert file.get("general.architecture", str) == "llama"
        assert file.get("llama.block_count", int) == 3
        assert file.get("llama.rope.freq_base", float) == 10000.0
        assert file.get("tokenizer.ggml.tokens", StringArray).tolist() == ["<s>", "▁a"]
        assert file.get("merges", np.ndarray).tolist() == [1, -2, 3]
        assert np.array_equal(file.tensor("w"), packed)
        assert file.tensor("norm").tobytes() == weights[0].tobytes()


def assert_same_as_oracle(path: Path) -> None:
    theirs = gguf.GGUFReader(path)
    with GGUFFile.open(path) as ours:
        fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
        assert list(ours.metadata) == list(fields)
        for key, expected in fields.items():
            value = ours.metadata[key]
            got = value.tolist() if isinstance(value, (np.ndarray, StringArray)) else value
            assert got == expected or (got != got and expected != expected), key
        assert list(ours.tensors) == [t.name for t in theirs.tensors]
        for tensor in theirs.tensors:
            info = ours.tensors[tensor.name]
            place = (tensor.data_offset, tensor.n_bytes, tuple(reversed(tensor.shape.tolist())))
            assert (info.offset, info.nbytes, info.shape) == place
            assert ours.tensor(tensor.name).tobytes() == tensor.data.tobytes()


def test_the_gguf_package_reads_what_the_builder_writes(small: Path) -> None:
    assert_same_as_oracle(small)


def test_golden_files_read_as_by_the_gguf_package(golden: Path) -> None:
    paths = [*sorted((golden / "archs").glob("*.gguf")), golden / "tokenizers" / "probe.gguf"]
    assert len(paths) > 10
    for path in paths:
        assert_same_as_oracle(path)


# Speed, in lines of Python


def test_a_large_vocabulary_opens_and_decodes_fast(tmp_path: Path) -> None:
    builder = GGUFBuilder()
    words = [f"▁token{i}" for i in range(262_144)]
    raw = b"".join(build.string(w.encode()) for w in words)
    builder.add_raw("tokens", build.ARRAY, struct.pack("<IQ", build.STRING, len(words)) + raw)
    path = builder.write(tmp_path / "m.gguf")
    with at_most_lines(12 * len(words)):
        file = GGUFFile.open(path)
    with at_most_lines(2 * len(words)):
        decoded = file.get("tokens", StringArray).tolist()
    assert decoded == words


def test_smollm2_opens_fast(smollm2_path: Path) -> None:
    assert_opens_fast(smollm2_path, 272)


def test_gemma3_opens_fast(gemma3_path: Path) -> None:
    assert_opens_fast(gemma3_path, 236)


def assert_opens_fast(path: Path, tensors: int) -> None:
    with at_most_lines(9_000_000), GGUFFile.open(path) as file:
        assert len(file.tensors) == tensors
