"""``shoal collect-env``: what a bug report should say about the machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import click

from shoal.cli.results import write_result

_PACKAGES = (
    "numpy",
    "numba",
    "llvmlite",
    "torch",
    "triton",
    "tokenizers",
    "jinja2",
    "huggingface_hub",
    "click",
    "gguf",
    "llama-cpp-python",
)
_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avxvnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512vnni",
    "avx512bf16",
    "neon",
    "dotprod",
    "i8mm",
)


@click.command("collect-env")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def collect_env(as_json: bool) -> None:
    """Print versions, CPU, memory and cache folders, as a bug report needs them."""
    import json

    facts = environment()
    if as_json:
        write_result(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        write_result(f"{name:{width}}  {_in_words(value)}")


def environment() -> dict[str, Any]:
    """The facts, ready for JSON. Memory is in bytes; ``threads`` is how many compute unless --threads says so."""
    import psutil

    from shoal.bench.machine import cpu_name
    from shoal.system.folders import cache_folder
    from shoal.system.machine_limits import limits_in_force
    from shoal.version import __version__

    return {
        "shoal": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=False),
        "hardware_threads": psutil.cpu_count(),
        "memory": psutil.virtual_memory().total,
        **limits_in_force(),
        **_cpu_backend(),
        **_gpu_backend(),
        "models_folder": _folder(cache_folder("SHOAL_CACHE", "models")),
        "packages": _versions(),
    }


def _cpu_backend() -> dict[str, Any]:
    """What the CPU kernels see of this machine: instruction set in use, flags, where compiled kernels are kept."""
    try:
        from shoal.kernels.cpu.isa import ISA, cpu_features
        from shoal.kernels.cpu.jit import STORE
    except (ImportError, ValueError) as error:  # SHOAL_ISA, or an installation that does not fit together
        return {"isa": f"none ({error})"}
    features = cpu_features()
    return {
        "isa": ISA,
        "cpu_flags": [flag for flag in _FLAGS if flag in features],
        "kernel_cache_folder": _folder(STORE.folder),
        "numba_settings": {name: value for name, value in os.environ.items() if name.startswith("NUMBA_")},
    }


def _gpu_backend() -> dict[str, Any]:
    """What --device auto takes, and the GPU if it is that."""
    from shoal.kernels.load import find_device, load_backend

    device = find_device("auto")
    if device != "cuda":
        return {"device_auto": device, "gpu": None}
    backend = load_backend(device)
    try:
        return {"device_auto": device, "gpu": backend.describe()}
    finally:
        backend.close()


def _folder(path: Path | None) -> str:
    """A cache folder, and whether anything can be kept there."""
    from shoal.system.folders import can_write

    if path is None:
        return "none (this user has no home)"
    return str(path) if can_write(path) else f"{path} (cannot be written)"


def _versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item or '-'}" for name, item in value.items())
    if isinstance(value, list):
        return " ".join(value)
    if isinstance(value, int) and value >= 1 << 20:
        return f"{value / 2**30:.1f} GiB"
    return "-" if value is None else str(value)
