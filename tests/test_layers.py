"""Who may import whom. Imports are read from the source: those in functions and under TYPE_CHECKING count too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import shoal

SOURCE = Path(shoal.__file__).parent

RANKS = {
    "errors": 0,
    "params": 0,
    "version": 0,
    "system": 1,
    "gguf": 2,
    "hub": 2,
    "text": 3,
    "kernels": 3,
    "models": 4,
    "chat": 4,
    "constrain": 4,
    "engine": 5,
    "requests": 6,
    "llm": 7,
    "openai": 8,
    "anthropic": 9,
    "jobs": 9,
    "server": 10,
    "ray": 11,
    "bench": 12,
    "cli": 13,
    "__main__": 14,
}

# Modules of one rank of which the first may import the second.
SAME_RANK = {("params", "errors")}

# Rooms of one part: what a job keeps knows nothing of what it reads, and neither of them what runs it; what
# a server keeps knows nothing of HTTP.
ROOMS = {"jobs.durable": 0, "jobs.input": 1, "jobs.running": 2, "server.store": 0, "server.routes": 1}

# Packages that only one part of shoal may import.
CONFINED = {
    "kernels.cpu": {"numba", "llvmlite"},
    "kernels.cuda": {"torch", "triton"},
    "constrain": {"llguidance"},
    "jobs": {"fsspec", "s3fs"},
    "ray": {"ray"},
    "server": {"aiohttp", "anyio", "fastapi", "prometheus_client", "python_multipart", "starlette", "uvicorn"},
}
ARITHMETIC = {"numpy", "torch"}
STANDARD_LIBRARY_ONLY = {"engine.sequence", "engine.page_pool", "engine.kv_group", "engine.scheduler"}


@dataclass(frozen=True)
class Import:
    """One imported module, as an absolute dotted name."""

    target: str
    line: int

    @property
    def package(self) -> str:
        return self.target.partition(".")[0]


def imports(source: str, module: str, *, is_package: bool = False) -> Iterator[Import]:
    """Everything that ``source``, the text of shoal's ``module``, imports anywhere."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, is_package)
            yield from (Import(_deepest(base, alias.name), node.lineno) for alias in node.names)


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    package = ["shoal", *module.split(".")]
    package = package[: len(package) - node.level + is_package]
    return ".".join([*package, *([node.module] if node.module else [])])


def _deepest(base: str, name: str) -> str:
    """``from shoal.engine import step`` imports a module, ``from shoal.engine.step import StepBatch`` a name."""
    inside = SOURCE.joinpath(*base.split(".")[1:], name)
    is_module = base.startswith("shoal") and (inside.is_dir() or inside.with_suffix(".py").is_file())
    return f"{base}.{name}" if is_module or base == "shoal" else base


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """The imports that ``module`` (as in ``engine.step``) must not have, each with the rule it breaks."""
    found = []
    for used in imports(source, module, is_package=is_package):
        rule = _broken_rule(module, used)
        if rule:
            found.append(f"{module}:{used.line} imports {used.target}: {rule}")
    return found


def _broken_rule(module: str, used: Import) -> str | None:
    if used.package == "shoal":
        return _broken_layer(module, used.target.partition(".")[2])
    for home, packages in CONFINED.items():
        if used.package in packages and not _within(module, home):
            return f"{used.package} belongs in {home} alone"
    if module == "models.transformer" and used.package in ARITHMETIC:
        return "the network has no arithmetic of its own"
    if module in STANDARD_LIBRARY_ONLY and used.package not in sys.stdlib_module_names:
        return "this module uses the standard library alone"
    return None


def _broken_layer(module: str, target: str) -> str | None:
    own, other = module.partition(".")[0], target.partition(".")[0]
    if other not in RANKS:
        return "import a name from the module that defines it"
    if own != other:
        below = RANKS[other] < RANKS[own] or (own, other) in SAME_RANK
        return None if below else f"{own} ({RANKS[own]}) is not above {other} ({RANKS[other]})"
    rooms = [room for room in (".".join(name.split(".")[:2]) for name in (module, target)) if room in ROOMS]
    if len(rooms) == 2 and ROOMS[rooms[0]] < ROOMS[rooms[1]]:
        return f"{rooms[0]} is below {rooms[1]}"
    backends = [backend for backend in ("kernels.cpu", "kernels.cuda") if _within(target, backend)]
    if module != "kernels.load" and not all(_within(module, backend) for backend in backends):
        return "only kernels.load chooses a backend"
    return None


def _within(module: str, home: str) -> bool:
    return module == home or module.startswith(f"{home}.")


def modules() -> list[tuple[str, Path]]:
    """Every module of shoal but its ``__init__``, which names things of all layers."""
    paths = [path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"]
    return [
        (".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"), path) for path in paths
    ]


def test_every_module_keeps_the_layers() -> None:
    found = []
    for module, path in modules():
        source = path.read_text(encoding="utf-8")
        found += violations(source, module, is_package=path.name == "__init__.py")
    assert not found, "\n".join(found)


def test_every_module_has_a_rank() -> None:
    parts = {module.partition(".")[0] for module, _ in modules()}
    assert parts <= RANKS.keys()
    assert {"engine", "kernels", "models", "gguf", "cli"} <= parts


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engine.engine", "from shoal.llm import LLM"),
        ("engine.engine", "from shoal import llm"),
        ("engine.engine", "from shoal import LLM"),
        ("engine.engine", "from .. import llm"),
        ("engine.engine", "import shoal.cli.main"),
        ("errors", "from shoal.params import EngineConfig"),
        ("engine.engine", "def late():\n    from shoal.jobs.running import job"),
        ("gguf.reader", "if TYPE_CHECKING:\n    from shoal.models.config import ModelConfig"),
        ("gguf.reader", "from shoal.hub import resolve"),
        ("text.chat", "from shoal.kernels.base import Backend"),
        ("kernels.reference", "import numba"),
        ("kernels.reference", "from shoal.kernels.cpu import linear"),
        ("kernels.base", "from .cpu.pack import pack"),
        ("kernels.cpu.linear", "from shoal.kernels.cuda import graphs"),
        ("kernels.cpu.linear", "import torch.nn"),
        ("models.transformer", "import numpy as np"),
        ("models.transformer", "from numpy.typing import NDArray"),
        ("jobs.durable.journal", "from shoal.jobs.input.rows import Row"),
        ("jobs.input.check", "from shoal.jobs.running.task import Task"),
        ("jobs.running.task", "from shoal import __version__"),
        ("engine.scheduler", "import numpy"),
        ("engine.page_pool", "import psutil"),
        ("jobs.running.job", "import uvicorn"),
        ("engine.masks", "import llguidance"),
        ("engine.masks", "from shoal.llm import LLM"),
        ("constrain.compiler", "from shoal.engine.constraint import Constraint"),
        ("unheard_of", "import numba"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engine.engine", "from shoal.engine.step import StepBatch\nfrom . import step\nfrom shoal import params"),
        ("engine.scheduler", "import heapq\nfrom shoal.engine.sequence import Sequence"),
        ("kernels.load", "def load():\n    from shoal.kernels.cpu.backend import CPUBackend"),
        ("kernels.cpu.linear", "import numba\nfrom shoal.kernels.cpu.simd import dot\nfrom ..base import Backend"),
        ("server.app", "import starlette.routing"),
        ("cli.main", "from shoal.version import __version__\nfrom shoal.llm import LLM"),
        ("jobs.running.job", "from shoal.jobs.durable import ledger\nfrom shoal.jobs.input.rows import Row"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_relative_imports_of_a_package_start_at_itself() -> None:
    assert violations("from . import step", "engine", is_package=True) == []
    assert violations("from .. import llm", "engine", is_package=True) != []


def test_importing_shoal_imports_nothing_heavy() -> None:
    heavy = {"numpy", "numba", "jinja2", "tokenizers", "huggingface_hub", "click", "shoal.params"}
    code = f"import sys, shoal; dir(shoal); print(sorted(sys.modules.keys() & {heavy!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_importing_shoal_takes_little() -> None:
    """Under 100 ms: a few modules of the standard library."""
    code = "import sys; before = set(sys.modules); import shoal; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    imported = set(done.stdout.split())
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names | {"shoal"}
    assert len(imported) < 60


def test_public_names_are_sorted_and_each_has_a_home() -> None:
    assert list(shoal.__all__) == sorted(shoal.__all__, key=lambda name: (not name.isupper(), name))  # as ruff sorts
    assert shoal._HOME.keys() == set(shoal.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        shoal.nothing  # noqa: B018 - the access is what is tested
