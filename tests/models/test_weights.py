from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shoal.errors import MemoryLimitError
from shoal.gguf.quants import dequantise, format_named
from shoal.gguf.reader import GGUFFile
from shoal.kernels.reference import ReferenceBackend
from shoal.models import weights
from shoal.models.weights import load_model
from shoal.system.machine_limits import MemoryRoom
from tests.support.tiny_model import write_tiny_model


def test_the_scale_of_a_whole_tensor_reaches_the_backend(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "ternary.gguf", width=128, fmt="I2_S")
    with GGUFFile.open(path) as file:
        scale = file.scale("blk.1.ffn_down.weight")
        units = dequantise(format_named("I2_S"), file.tensor("blk.1.ffn_down.weight"))
        mlp = load_model(file, ReferenceBackend()).layers[1].mlp
    assert mlp is not None
    assert scale not in (0.0, 1.0)
    assert np.array_equal(mlp.down.matrix, units * np.float32(scale))


def test_weights_that_have_no_room_are_refused_before_they_are_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "memory_room", lambda: MemoryRoom(5000, 9000, "/sys/fs/cgroup/memory.max"))
    with (
        GGUFFile.open(write_tiny_model(tmp_path / "tiny.gguf")) as file,
        pytest.raises(
            MemoryLimitError, match=r"the weights need \d+ bytes, 5000 bytes .* in /sys/fs/cgroup/memory.max"
        ),
    ):
        load_model(file, ReferenceBackend())
