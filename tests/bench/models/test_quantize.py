"""llama.cpp's quantiser: what is run, and what is said where it cannot be or fails."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

from shoal.bench.models import quantize as module
from shoal.bench.models.quantize import command, quantize
from shoal.errors import ParameterError
from shoal.gguf.reader import GGUFFile


def scripted(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Run ``code`` where llama.cpp would run; its arguments are model, type and file."""
    monkeypatch.setattr(module, "importable", lambda pythons: None)
    monkeypatch.setattr(
        module, "command", lambda python, model, kind, out, threads: [python, "-c", code, str(model), kind, str(out)]
    )


def test_what_runs() -> None:
    python, script, *arguments = command("some/python", Path("in.gguf"), "Q4_K_M", Path("out.gguf"), 3)
    assert python == "some/python"
    assert Path(script).name == "llama_quantize.py"
    assert Path(script).is_file()
    assert arguments == ["in.gguf", "Q4_K_M", "out.gguf", "3"]


def test_the_file_appears_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, "import sys; open(sys.argv[3], 'w').write(' '.join(sys.argv[1:3]))")
    out = tmp_path / "out.gguf"
    quantize(Path("in.gguf"), "Q6_K", out, python=sys.executable, threads=1)
    assert out.read_text() == "in.gguf Q6_K"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("ending", "reason"), [("sys.exit('much\\nneeds an imatrix')", "needs an imatrix"), ("sys.exit(3)", "not say why")]
)
def test_a_failure_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, reason: str
) -> None:
    scripted(monkeypatch, f"import sys; open(sys.argv[3], 'w').write('half'); {ending}")
    with pytest.raises(ParameterError, match=f"type: got 'IQ1_S'.*{reason}"):
        quantize(Path("in.gguf"), "IQ1_S", tmp_path / "out.gguf", python=sys.executable, threads=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_cpp_makes_a_file(tmp_path: Path, smollm2_path: Path) -> None:
    out = tmp_path / "out.gguf"
    quantize(smollm2_path, "Q4_0", out, python=sys.executable, threads=1)
    with GGUFFile.open(out) as file:
        found = Counter(info.format.name for info in file.tensors.values())
    assert found["Q4_0"] == 210
    with pytest.raises(ParameterError, match=r"this llama\.cpp knows .*Q4_K_M"):
        quantize(smollm2_path, "Q4_9", out, python=sys.executable, threads=1)
