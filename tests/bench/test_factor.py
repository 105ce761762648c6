"""Throughput factors: kept from one process to the next, never guessed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from shoal import bench
from shoal.bench import factor
from shoal.bench.factor import BatchingFactors, last_measured, remember
from shoal.errors import ModelNotFoundError, NotMeasuredError
from shoal.kernels.reference import ReferenceBackend

BACKEND = ReferenceBackend().describe()
MEASURED = BatchingFactors("2030-01-02T03:04:05+00:00", {16: {1: 1.0, 4: 3.5}, 128: {1: 1.0, 4: 3.0, 16: 8.0}})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOAL_BENCH_CACHE", str(tmp_path / "bench"))
    return tmp_path / "bench"


def ask(model: Path, batch: int, prompt_len: int | None = None) -> float:
    return bench.throughput_factor(model, batch, prompt_len=prompt_len, device="reference")


def test_what_was_measured_is_returned(tiny: Path) -> None:
    remember(tiny, BACKEND, MEASURED)
    assert last_measured(tiny, BACKEND) == MEASURED
    assert ask(tiny, 16) == 8.0
    assert ask(tiny, 4) == 3.0  # at the longest prompts
    assert ask(tiny, 4, prompt_len=16) == 3.5


def test_a_later_sweep_replaces_only_what_it_measured(tiny: Path) -> None:
    remember(tiny, BACKEND, MEASURED)
    remember(tiny, BACKEND, BatchingFactors("2031", {128: {1: 1.0, 4: 2.0}, 512: {1: 1.0}}))
    found = last_measured(tiny, BACKEND)
    assert found is not None
    assert found.date == "2031"
    assert found.factors == {16: {1: 1.0, 4: 3.5}, 128: {1: 1.0, 4: 2.0, 16: 8.0}, 512: {1: 1.0}}


@pytest.mark.parametrize(
    "damaged",
    ["", "{", "[]", '{"factors": 3, "date": "2031"}', '{"factors": {"x": {}}, "date": ""}', '{"factors": {}}', None],
)
def test_what_can_no_longer_be_read_was_not_measured(tiny: Path, cache: Path, damaged: str | None) -> None:
    remember(tiny, BACKEND, MEASURED)
    (file,) = cache.iterdir()
    if damaged is None:
        file.write_bytes(b"\xff\xfe\0")
    else:
        file.write_text(damaged)
    assert last_measured(tiny, BACKEND) is None
    remember(tiny, BACKEND, MEASURED)
    assert last_measured(tiny, BACKEND) == MEASURED


def test_without_a_place_nothing_was_measured(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SHOAL_BENCH_CACHE", str(tmp_path / "file" / "bench"))
    assert last_measured(tiny, BACKEND) is None
    monkeypatch.setattr(factor, "cache_folder", lambda variable, name: None)
    assert last_measured(tiny, BACKEND) is None
    with pytest.raises(OSError, match="no home folder"):
        remember(tiny, BACKEND, MEASURED)


def test_without_a_measurement_the_command_is_named(tiny: Path) -> None:
    assert last_measured(tiny, BACKEND) is None
    with pytest.raises(NotMeasuredError, match=f"run `shoal bench sweep {tiny} --batch 1,8`"):
        ask(tiny, 8)


@pytest.mark.parametrize(
    ("batch", "nearest"), [(2, "1 and 4"), (8, "4 and 16"), (32, "16")], ids=["few", "between", "beyond"]
)
def test_nothing_is_interpolated(tiny: Path, batch: int, nearest: str) -> None:
    remember(tiny, BACKEND, MEASURED)
    with pytest.raises(NotMeasuredError, match=rf"with {batch} sequences: .*\(measured nearest to it: {nearest}\)"):
        ask(tiny, batch)


def test_another_length_of_prompts_has_to_be_measured(tiny: Path) -> None:
    remember(tiny, BACKEND, MEASURED)
    with pytest.raises(NotMeasuredError, match=r"prompts of 512 tokens: not measured here; run .* --prompt-len 512`"):
        ask(tiny, 4, prompt_len=512)


@pytest.mark.parametrize("changed", ["file", "backend", "cpu", "version"])
def test_it_holds_for_this_file_machine_backend_and_version(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    remember(tiny, BACKEND, MEASURED)
    model = tmp_path / "copy.gguf"
    shutil.copy(tiny, model)
    assert last_measured(model, BACKEND) == MEASURED  # a name is no difference
    backend = BACKEND
    if changed == "file":
        model.write_bytes(model.read_bytes() + b"\0")
    elif changed == "backend":
        backend = "cpu: 7 threads"
    elif changed == "cpu":
        monkeypatch.setattr(factor, "cpu_name", lambda: "Other CPU")
    else:
        monkeypatch.setattr(factor, "__version__", "9.9")
    assert last_measured(model, backend) is None


def test_a_model_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        ask(tmp_path / "absent.gguf", 1)
