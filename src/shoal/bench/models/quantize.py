"""Files of other types for benchmarks, made by llama.cpp's own quantiser."""

from __future__ import annotations

import subprocess
from pathlib import Path

from shoal.bench.peers.programs import LLAMA_CPP, importable
from shoal.errors import ParameterError


def quantize(model: Path, type_name: str, out: Path, *, python: str, threads: int) -> None:
    """Write ``model`` again as a file of this type, as in "Q4_K_M"; what is quantised already is quantised once more.

    ``out`` appears once it is complete. ``python`` is an interpreter that can import llama_cpp.

    Raises ParameterError where it cannot, and with llama.cpp's own reason where that cannot make the file.
    """
    importable({LLAMA_CPP: python})
    partial = out.with_name(out.name + ".partial")
    try:
        done = subprocess.run(
            command(python, model, type_name, partial, threads),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            raise ParameterError("type", type_name, f"one that llama.cpp can make: {_last_line(done.stderr)}")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def command(python: str, model: Path, type_name: str, out: Path, threads: int) -> list[str]:
    """What runs: llama_quantize.py in the interpreter that has llama-cpp-python."""
    script = Path(__file__).with_name("llama_quantize.py")
    return [python, str(script), str(model), type_name, str(out), str(threads)]


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it does not say why"
