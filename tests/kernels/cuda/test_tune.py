"""Tiles are chosen by a clock that tests set; tables are kept in a file that may be damaged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal.bench.models.random_weights import random_rows
from shoal.gguf.quants import format_named
from shoal.kernels.base import RawTensor
from shoal.kernels.cuda import linear, tune
from shoal.kernels.cuda.launch import device, launches_go_to
from shoal.kernels.cuda.linear import CHIPS, FEW, PLAIN, Config, Form, as_on
from shoal.kernels.cuda.pack import PackedMatrix, pack_matrix


@pytest.fixture(autouse=True)
def untuned() -> Iterator[None]:
    linear.TUNED.clear()
    yield
    linear.TUNED.clear()


@pytest.fixture
def matrix() -> PackedMatrix:
    fmt = format_named("Q8_0")
    return pack_matrix([RawTensor("w", fmt, (64, 64), random_rows(fmt, (64, 64), np.random.default_rng(0)))])


def test_the_fastest_that_runs_is_chosen() -> None:
    times = {Config(64, 16, 4, stages): seconds for stages, seconds in ((2, 3.0), (3, 1.0), (4, 1.0))}

    def seconds(config: Config) -> float:
        if config.block_m == 128:
            raise RuntimeError("out of resource: shared memory")
        return times[config]

    assert tune.fastest([Config(128, 16, 4, 2), *times], seconds) == Config(64, 16, 4, 3)
    assert tune.fastest([Config(128, 16, 4, 2)], seconds) is None
    assert tune.fastest([Config(64, 16, 4, 2)], lambda config: float("nan")) is None


def test_each_bucket_gets_what_was_fastest_and_only_that_is_used(matrix: PackedMatrix) -> None:
    tried: list[Config] = []

    def seconds(run: Callable[[], None]) -> float:
        (config,) = [config for key, config in linear.TUNED.items() if key[3] == bucket_now(tried)]
        tried.append(config)
        return 1.0 if config.stages == 4 else 2.0

    def bucket_now(tried: list[Config]) -> int:
        return 16 if len(tried) < len(tune.candidates(16, PLAIN)) else 64

    found = tune.tune([(matrix, PLAIN)], [1, 3, 16, 33], seconds)
    assert found == linear.TUNED
    assert list(found) == [("Q8_0", 64, 64, 16, PLAIN), ("Q8_0", 64, 64, 64, PLAIN)]
    assert {config.stages for config in found.values()} == {4}
    assert tried == tune.candidates(16, PLAIN) + tune.candidates(64, PLAIN)
    assert not tune.tune([(matrix, PLAIN)], [1, 64], seconds), "what is known is not measured again"


def test_once_there_is_enough_nothing_more_is_measured(matrix: PackedMatrix) -> None:
    measured: list[int] = []

    def seconds(run: Callable[[], None]) -> float:
        measured.append(1)
        return 1.0

    found = tune.tune([(matrix, PLAIN)], [1, 64], seconds, lambda: len(measured) > 0)
    assert list(found) == [("Q8_0", 64, 64, 16, PLAIN)]
    assert found == linear.TUNED


def test_each_part_of_a_matrix_is_measured_within_its_own_output() -> None:
    formats = [format_named("Q8_0"), format_named("Q4_0")]
    tensors = [RawTensor("w", fmt, (64, 64), random_rows(fmt, (64, 64), np.random.default_rng(0))) for fmt in formats]
    widths: list[int] = []

    def seconds(run: Callable[[], None]) -> float:
        with launches_go_to(lambda kernel, grid, args, options: widths.append(args[12].shape[1])):
            run()
        return 1.0

    tune.tune([(pack_matrix(tensors), PLAIN)], [1], seconds)
    assert set(widths) == {64}


def test_no_choice_changes_a_bit(matrix: PackedMatrix) -> None:
    half = torch.randn((5, 64), generator=torch.Generator().manual_seed(0)).half().to(device())
    source = linear.Source(half, torch.ones(5, device=device()))

    def product() -> torch.Tensor:
        out = torch.zeros((5, 64), device=device())
        linear.linear(source, matrix, out, 5)
        return out

    usual = product()
    for config in tune.candidates(16, PLAIN):
        linear.TUNED["Q8_0", 64, 64, 16, PLAIN] = config
        assert torch.equal(product(), usual), config


GATED_FLOATS = Form(floats=True, gated=True)


@pytest.mark.parametrize("rows", [16, FEW, FEW + 1])
@pytest.mark.parametrize("form", [Form(floats=True), Form(gated=True), GATED_FLOATS])
def test_what_is_measured_is_what_networks_launch(form: Form, rows: int) -> None:
    fmt = format_named("Q8_0")
    matrix = pack_matrix([RawTensor("w", fmt, (128, 64), random_rows(fmt, (128, 64), np.random.default_rng(0)))])
    launched: list[tuple[bool, bool]] = []

    def note(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        launched.append((args[0].dtype == torch.float32, options["ACTIVATION"] != ""))

    def seconds(run: Callable[[], None]) -> float:
        with launches_go_to(note):
            run()
        return 1.0

    found = tune.tune([(matrix, form)], [rows], seconds)
    expected = Form(form.floats and rows <= FEW, form.gated)
    assert list(found) == [("Q8_0", 128, 64, linear.bucket(rows), expected)]
    assert set(launched) == {(expected.floats, expected.gated)}
    assert len(launched) == len(tune.candidates(linear.bucket(rows), expected))
    assert not form.gated or {config.block_m for config in found.values()} == {linear.GATED_TILE}


def test_what_cannot_be_gated_is_measured_without(matrix: PackedMatrix) -> None:
    assert not linear.can_gate(matrix)
    found = tune.tune([(matrix, Form(gated=True))], [1], lambda run: 1.0)
    assert list(found) == [("Q8_0", 64, 64, 16, PLAIN)]


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_candidates_are_those_of_the_chip(chip: str) -> None:
    with as_on(CHIPS[chip]):
        usual = {bucket: tune.candidates(bucket, Form(floats=bucket <= FEW))[0] for bucket in linear.CONFIGS}
    assert usual == CHIPS[chip].configs | CHIPS[chip].floats


def test_a_table_comes_back_from_its_file(tmp_path: Path) -> None:
    table = {
        ("Q4_K", 4096, 14336, 64, PLAIN): tune.candidates(64, PLAIN)[-1],
        ("Q6_K", 576, 1536, 16, Form(floats=True)): tune.candidates(16, Form(floats=True))[1],
        ("Q6_K", 576, 1536, 16, GATED_FLOATS): tune.candidates(16, GATED_FLOATS)[1],
    }
    path = tmp_path / "of" / "a device.json"
    tune.save(path, table)
    assert tune.load(path) == 3
    assert table == linear.TUNED
    assert list(path.parent.iterdir()) == [path]
    assert tune.load(tmp_path / "another.json") == 0
    assert tune.load(None) == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "\x00\x01",
        '{"Q4_K 64x64": [64, 16, 4, 3]}',
        '{"Q4_K 64x64 16": [64, 16, 4]}',
        '{"Q4_K 64x64 16": 5}',
        '{"Q4_K 64x64 16": [48, 16, 4, 3]}',
        '{"Q4_K 64x64 17": [64, 16, 4, 3]}',
        '{"Q4_K 64x64 16 gated floats": [64, 16, 4, 3]}',
        '{"Q4_K 64x64 16 gated": [128, 16, 4, 3]}',
        '{"Q4_K 64x64 16": [64, 16, 4, 3], "Q6_K 64x64 16": [64, 16, 5, 3]}',
    ],
)
def test_a_damaged_file_is_ignored_as_a_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert tune.load(path) == 0
    assert linear.TUNED == {}
    assert "not a table of tuned kernels, ignored" in caplog.text


def test_the_file_is_named_after_the_device_and_the_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_TUNED", str(tmp_path))
    path = tune.table_path()
    assert path is not None
    assert path.parent == tmp_path
    assert path.name.startswith("interpreter-shoal-0.")
    assert "-triton-3." in path.name
