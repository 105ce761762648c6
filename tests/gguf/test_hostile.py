"""Files that lie. Each gives one GGUFError that says which field, where and why, before any weight is read."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shoal.errors import GGUFError
from shoal.gguf.header import MAX_ARRAY_STRINGS, MAX_DECODED_BYTES, MAX_METADATA, MAX_TENSORS, read_header
from shoal.gguf.reader import GGUFFile, StringArray
from tests.support import gguf_builder as build
from tests.support.effort import at_most_lines
from tests.support.gguf_builder import GGUFBuilder

F32, Q4_0, Q4_K = 0, 2, 12
HUGE = 2**63
GIB = 1 << 30


def refusal(data: bytes) -> GGUFError:
    """The error that a file of these bytes gives; its message is one line."""
    with pytest.raises(GGUFError) as caught:
        read_header(Path("m.gguf"), data)
    assert 0 <= caught.value.offset <= len(data)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400
    return caught.value


def example() -> GGUFBuilder:
    """A small file with every kind of entry."""
    rng = np.random.default_rng(0)
    builder = GGUFBuilder(alignment=64)
    builder.add("general.architecture", "llama")
    builder.add("llama.block_count", 2)
    builder.add("eps", 1e-5)
    builder.add("flag", True)
    builder.add("tokens", ["a", "bc", "▁d"])
    builder.add("scores", [0.5, -1.0, 2.0])
    builder.add("flags", [True, False])
    for name in ("Q4_1", "Q4_K", "F16"):
        builder.add_random_tensor(f"{name}.weight", (2, 256), name, rng)
    builder.add_tensor("norm", np.ones(5, dtype=np.float32))
    return builder


# Magic, version, counts


@pytest.mark.parametrize("magic", [b"GGML", b"\0\0\0\0", b"FUGG", b"\x7fELF"])
def test_magic(magic: bytes) -> None:
    builder = example()
    builder.magic = magic
    error = refusal(builder.to_bytes())
    assert (error.field, error.offset) == ("magic", 0)
    assert "not a GGUF file" in error.reason


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (0, "version 0 is unknown"),
        (1, "version 1 is no longer supported"),
        (4, "version 4 is unknown"),
        (2**32 - 1, "is unknown"),
        (2 << 24, "big-endian file (version 2)"),
        (3 << 24, "big-endian file (version 3)"),
    ],
)
def test_version(version: int, reason: str) -> None:
    error = refusal(GGUFBuilder(version=version).to_bytes())
    assert (error.field, error.offset) == ("version", 4)
    assert reason in error.reason


@pytest.mark.parametrize("count", [2**64 - 1, HUGE, 2**61, 2**32, 100])
def test_counts_larger_than_the_file(count: int) -> None:
    for attribute, field, offset in (("tensor_count", "tensor_count", 8), ("metadata_count", "metadata_kv_count", 16)):
        builder = example()
        setattr(builder, attribute, count)
        error = refusal(builder.header())
        assert (error.field, error.offset) == (field, offset)
        assert f"{count} items need" in error.reason


def test_counts_that_fit_the_file_but_no_model() -> None:
    builder = GGUFBuilder()
    builder.metadata_count = MAX_METADATA + 1
    assert "over the limit" in refusal(builder.to_bytes() + bytes(1 << 22)).reason


# Metadata


def with_key(key: str | bytes, type_id: int, data: bytes) -> bytes:
    builder = GGUFBuilder()
    builder.add_raw(key, type_id, data)
    return builder.to_bytes()


def array(type_id: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", type_id, count) + data


@pytest.mark.parametrize("length", [2**64 - 1, HUGE, 2**32, 9])
def test_string_lengths(length: int) -> None:
    claim = struct.pack("<Q", length) + b"8 bytes."
    for data, field in (
        (with_key("key", build.STRING, claim), "key"),
        (with_key("key", build.ARRAY, array(build.STRING, 1, claim)), "key"),
        (GGUFBuilder().to_bytes()[:16] + struct.pack("<Q", 1) + claim, "metadata[0].key"),
    ):
        assert refusal(data).field == field


@pytest.mark.parametrize("count", [2**64 - 1, HUGE, 2**61, 2**32, 3])
@pytest.mark.parametrize("type_id", [build.UINT8, build.FLOAT64, build.BOOL, build.STRING])
def test_array_lengths(count: int, type_id: int) -> None:
    error = refusal(with_key("key", build.ARRAY, array(type_id, count, b"\0\0")))
    assert error.field == "key"
    assert f"{count} items need" in error.reason


def test_a_string_in_an_array_that_runs_past_the_end() -> None:
    strings = build.string(b"ok") + struct.pack("<Q", 2**64 - 8) + b"rest"
    error = refusal(with_key("key", build.ARRAY, array(build.STRING, 2, strings)))
    assert "string 1 of 2 runs past the end" in error.reason


@pytest.mark.parametrize(
    ("type_id", "data", "reason"),
    [
        (13, b"\0" * 8, "value type 13 is unknown"),
        (2**32 - 1, b"\0" * 8, "is unknown"),
        (build.ARRAY, array(13, 0), "element type 13 is unknown"),
        (build.ARRAY, array(build.ARRAY, 1, array(build.UINT8, 1, b"\0")), "array of arrays"),
    ],
)
def test_values(type_id: int, data: bytes, reason: str) -> None:
    error = refusal(with_key("key", type_id, data))
    assert error.field == "key"
    assert reason in error.reason


def test_keys() -> None:
    assert "empty" in refusal(with_key("", build.UINT8, b"\0")).reason
    builder = example()
    builder.add("eps", 1.0)
    error = refusal(builder.to_bytes())
    assert (error.field, error.reason) == ("eps", "duplicate key")


def test_names_cannot_write_to_the_terminal_or_fill_it() -> None:
    error = refusal(with_key("\x1b[2J\n" + "x" * 500, build.STRING, b""))
    assert error.field.startswith("\\x1b[2J\\nxxx")
    assert len(error.field) == 80


@pytest.mark.parametrize("alignment", [0, 13, 33, 2**32 - 1])
def test_alignment_that_is_no_power_of_two(alignment: int) -> None:
    error = refusal(with_key("general.alignment", build.UINT32, struct.pack("<I", alignment)))
    assert error.field == "general.alignment"
    assert f"{alignment} is not a power of two" in error.reason


@pytest.mark.parametrize("type_id", [build.INT32, build.UINT64, build.FLOAT32, build.BOOL, build.STRING, build.ARRAY])
def test_alignment_of_another_type(type_id: int) -> None:
    error = refusal(with_key("general.alignment", type_id, struct.pack("<Q", 32)))
    assert error.field == "general.alignment"
    assert f"value type {type_id}, must be 4" in error.reason


def test_an_alignment_larger_than_the_file() -> None:
    builder = GGUFBuilder()
    builder.add("general.alignment", 2**31)
    builder.add_tensor("w", np.ones(8, dtype=np.float32))
    assert "data ends at byte 2147483680" in refusal(builder.to_bytes()).reason


# Tensors


def with_tensor(
    dims: list[int], type_id: int = F32, offset: int = 0, n_dims: int | None = None, name: str = "w"
) -> bytes:
    builder = GGUFBuilder()
    builder.add_raw_tensor(name, dims, type_id, bytes(256), offset=offset, n_dims=n_dims)
    return builder.to_bytes()


@pytest.mark.parametrize("n_dims", [0, 5, 8, 2**31, 2**32 - 1])
def test_number_of_dimensions(n_dims: int) -> None:
    error = refusal(with_tensor([1] * min(n_dims, 8), n_dims=n_dims))
    assert (error.field, error.reason) == ("tensor 'w' n_dims", f"{n_dims} is not from 1 to 4")


@pytest.mark.parametrize("dims", [[0], [8, 0], [-1], [8, -8], [HUGE], [1, 2**64 - 1]])
def test_sizes_of_dimensions(dims: list[int]) -> None:
    error = refusal(with_tensor(dims))
    assert error.field.startswith("tensor 'w' dims[")
    assert "is not from 1 to 2^63 - 1" in error.reason


@pytest.mark.parametrize("dims", [[2**32, 2**31], [2**16] * 4, [2**62, 2, 1, 1], [2**32, 2**32, 2**32, 2**32]])
def test_product_of_dimensions(dims: list[int]) -> None:
    """Products that wrap to 0 or to a small number in 64 bits."""
    error = refusal(with_tensor(dims))
    assert error.field == "tensor 'w' dims"
    assert "must be below 2^63" in error.reason


@pytest.mark.parametrize("dims", [[2**62], [2**40, 2**20], [2**61, 2]])
def test_sizes_in_bytes_that_would_wrap(dims: list[int]) -> None:
    assert "data ends at byte" in refusal(with_tensor(dims)).reason


@pytest.mark.parametrize(("columns", "type_id", "block"), [(33, Q4_0, 32), (1, Q4_0, 32), (128, Q4_K, 256)])
def test_rows_that_are_no_whole_blocks(columns: int, type_id: int, block: int) -> None:
    error = refusal(with_tensor([columns, 2], type_id))
    assert error.field == "tensor 'w' type"
    assert f"rows of {columns} numbers are not a multiple of" in error.reason
    assert error.reason.endswith(f"block of {block}")


@pytest.mark.parametrize(
    ("type_id", "reason"),
    [
        (4, "type 4 (Q4_2) was removed"),
        (5, "type 5 (Q4_3) was removed"),
        (31, "type 31 (Q4_0_4_4) was removed"),
        (33, "type 33 (Q4_0_8_8) was removed"),
        (38, "type 38 (IQ4_NL_8_8) was removed"),
        (999, "type 999 is unknown"),
        (2**32 - 1, "type 4294967295 is unknown"),
    ],
)
def test_types_that_are_unknown_or_removed(type_id: int, reason: str) -> None:
    error = refusal(with_tensor([256], type_id, name="blk.0.ffn_up.weight"))
    assert error.field == "tensor 'blk.0.ffn_up.weight' type"
    assert error.reason.startswith(reason)


@pytest.mark.parametrize("offset", [1, 16, 31, 33])
def test_offsets_that_are_not_aligned(offset: int) -> None:
    error = refusal(with_tensor([8], offset=offset))
    assert (error.field, error.reason) == ("tensor 'w' offset", f"{offset} is not a multiple of the alignment 32")


@pytest.mark.parametrize("offset", [256, 2**62, 2**64 - 32])
def test_offsets_past_the_end(offset: int) -> None:
    builder = GGUFBuilder()
    builder.add_tensor("first", np.ones(64, dtype=np.float32))
    builder.add_raw_tensor("w", [8], F32, b"", offset=offset)
    error = refusal(builder.to_bytes())
    assert error.field == "tensor 'w' offset"
    assert "data ends at byte" in error.reason


@pytest.mark.parametrize("offset", [0, 32, 224])
def test_tensors_that_overlap(offset: int) -> None:
    builder = GGUFBuilder()
    builder.add_raw_tensor("second", [8], F32, b"", offset=offset)
    builder.add_raw_tensor("first", [64], F32, bytes(256), offset=0)
    error = refusal(builder.to_bytes())
    assert "overlaps tensor" in error.reason
    assert {error.field.split("'")[1], error.reason.split("'")[1]} == {"first", "second"}


def test_tensors_may_stand_in_any_order_and_leave_gaps() -> None:
    builder = GGUFBuilder()
    builder.add_raw_tensor("late", [8], F32, bytes(32), offset=512)
    builder.add_raw_tensor("early", [8], F32, bytes(32), offset=64)
    tensors = read_header(Path("m.gguf"), builder.to_bytes()).tensors
    assert tensors["late"].offset - tensors["early"].offset == 448


def test_duplicate_tensor_names() -> None:
    builder = example()
    builder.add_tensor("norm", np.ones(5, dtype=np.float32))
    error = refusal(builder.to_bytes())
    assert (error.field, error.reason) == ("tensor 'norm'", "duplicate name")
    assert builder.to_bytes()[error.offset :].startswith(build.string(b"norm"))


# Any byte


def use(data: bytes) -> None:
    """Open and touch everything that a reader of the file might."""
    path = Path("m.gguf")
    file = GGUFFile([path], [read_header(path, data)], [data])
    for value in file.metadata.values():
        if isinstance(value, StringArray):
            value.bytes_list()
            value.tolist()
    for name in file.tensors:
        file.tensor(name).sum()
    file.check_tensors()


def test_the_example_is_well_formed() -> None:
    use(example().to_bytes())


def test_every_truncation_is_refused() -> None:
    data = example().to_bytes()
    assert len(data) > 1000
    for length in range(len(data)):
        refusal(data[:length])


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    with pytest.raises(GGUFError, match="magic at byte 0: needs 4 bytes, the file has 0 left"):
        GGUFFile.open(tmp_path / "m.gguf")


def mutate(data: bytes, limit: int, rng: random.Random) -> bytes:
    """One to four bytes of the first ``limit`` set to something else, mostly to what breaks counters."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        out[rng.randrange(limit)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(out)


def test_mutations_open_or_are_refused() -> None:
    """10^4 files with a few wrong bytes: GGUFError or nothing."""
    builder = example()
    data, header = builder.to_bytes(), len(builder.header())
    rng = random.Random(0)
    refused = 0
    for _ in range(10_000):
        try:
            use(mutate(data, rng.choice((header, len(data))), rng))
        except GGUFError:
            refused += 1
    assert 1_000 < refused < 9_000


# Time and memory


def sparse(tmp_path: Path, start: bytes, size: int) -> Path:
    """A file of ``size`` bytes, all zero after ``start``, that takes no space."""
    path = tmp_path / "big.gguf"
    with path.open("wb") as out:
        out.write(start)
        out.truncate(size)
    return path


def most_of_everything(part: int = 1) -> bytes:
    """As many keys, tensors, strings and text as a header may hold, or a ``part``-th of that, and well-formed."""
    num_keys, num_tensors, num_strings = MAX_METADATA // part, MAX_TENSORS // part, MAX_ARRAY_STRINGS // part
    keys = b"".join(build.string(b"k%d" % i) + struct.pack("<IB", build.UINT8, 0) for i in range(num_keys - 2))
    words = b"x" * ((MAX_DECODED_BYTES - (1 << 19)) // part)
    text = build.string(b"text") + struct.pack("<I", build.STRING) + build.string(words)
    rows = b"".join(build.string(b"%d" % i) + struct.pack("<IQIQ", 1, 8, F32, 32 * i) for i in range(num_tensors))
    strings = build.string(b"words") + struct.pack("<I", build.ARRAY) + array(build.STRING, num_strings)
    start = GGUFBuilder().to_bytes()[:8] + struct.pack("<QQ", num_tensors, num_keys)
    return start + keys + text + strings + bytes(8 * num_strings) + rows


def test_the_largest_header_allowed_opens(tmp_path: Path) -> None:
    with GGUFFile.open(sparse(tmp_path, most_of_everything(), GIB)) as file:
        assert (len(file.metadata), len(file.tensors)) == (MAX_METADATA, MAX_TENSORS)
        assert len(file.get("words", StringArray)) == MAX_ARRAY_STRINGS


BIG: dict[str, Callable[[], bytes]] = {
    "many strings": lambda: with_key("k", build.ARRAY, array(build.STRING, 1 << 26)),
    "long string": lambda: with_key("k", build.STRING, struct.pack("<Q", GIB)),
    "long key": lambda: GGUFBuilder().to_bytes()[:16] + struct.pack("<QQ", 1, GIB),
    "many booleans": lambda: with_key("k", build.ARRAY, array(build.BOOL, GIB)),
    "most booleans allowed": lambda: with_key("k", build.ARRAY, array(build.BOOL, MAX_DECODED_BYTES - 1)),
    "many numbers": lambda: with_key("k", build.ARRAY, array(build.FLOAT64, GIB // 8)),
    "many keys": lambda: GGUFBuilder().to_bytes()[:16] + struct.pack("<Q", MAX_METADATA),
    "most of everything": most_of_everything,
}


@pytest.mark.parametrize("name", BIG)
def test_a_large_file_costs_at_most_256_mib(name: str, tmp_path: Path) -> None:
    """Whether it is refused or not."""
    path = sparse(tmp_path, BIG[name](), 2 * GIB)
    tracemalloc.start()
    try:
        attempt(path)
        assert tracemalloc.get_traced_memory()[1] < 256 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", BIG)
def test_a_large_file_costs_at_most_a_second(name: str, tmp_path: Path) -> None:
    """Whether it is refused or not. A second is counted in lines of Python, which no busy machine makes more: 30 million. To count
    takes long, so it is a quarter of them, for a quarter of everything."""
    start = most_of_everything(4) if name == "most of everything" else BIG[name]()
    with at_most_lines(7_500_000):  # such a header takes 4.5 million, and an eighth of a second
        attempt(sparse(tmp_path, start, 2 * GIB))


def test_a_loop_without_end_runs_out_of_lines() -> None:
    with pytest.raises(AssertionError, match="more than 1000 lines"), at_most_lines(1000):
        sum(i for i in range(1 << 40))


def attempt(path: Path) -> None:
    try:
        GGUFFile.open(path).close()
    except GGUFError as error:
        assert len(str(error)) < 1000  # noqa: PT017 - either outcome is right here
