"""The pictures of a sweep: PNG files with something in them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from shoal.bench.sweep.plots import draw
from tests.bench.sweep.test_measure import cell

CELLS = [cell(batch, 1 + batch / 8, prompt_len) for prompt_len in (1, 128) for batch in (1, 4, 16)]


def test_one_model_is_one_picture(tmp_path: Path) -> None:
    (path,) = draw(CELLS, tmp_path)
    assert path == tmp_path / "m.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_several_models_are_compared(tmp_path: Path) -> None:
    paths = draw([*CELLS, cell(4, 0.5, 128, model="n.gguf")], tmp_path)
    assert [path.name for path in paths] == ["m.png", "n.png", "models.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)
