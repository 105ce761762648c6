"""The programs that ``shoal bench peers`` measures shoal beside."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from shoal.errors import ParameterError

Settings = Iterator[tuple[str, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer: ``module`` is what its interpreter must be able to import, ``package`` how pip calls it, ``script`` its worker.

    ``settings`` gives, for a number of sequences, the settings to be tried: a name for the table, and arguments of the worker's
    ``measure``.
    """

    name: str
    module: str
    package: str
    script: str
    settings: Callable[[int], Settings]

    def command(self, python: str, settings: Mapping[str, Any]) -> list[str]:
        """What starts the worker."""
        return [python, str(Path(__file__).with_name(self.script)), json.dumps(settings)]


def _llama_settings(batch: int) -> Settings:
    """Flash attention, one KV buffer for all sequences; with one sequence there is nothing to unify."""
    for flash_attn, kv_unified in product((True, False), (True, False) if batch > 1 else (False,)):
        name = f"fa {'on' if flash_attn else 'off'}" + (", unified kv" if kv_unified else "")
        yield name, {"flash_attn": flash_attn, "kv_unified": kv_unified}


def _openvino_settings(batch: int) -> Settings:
    """The KV cache as shoal and llama.cpp have it, and OpenVINO's own choice."""
    for kv_type in ("f16", "u8"):
        yield f"kv {kv_type}", {"kv_type": kv_type}


LLAMA_CPP = Peer("llama.cpp", "llama_cpp", "llama-cpp-python", "llama_worker.py", _llama_settings)
OPENVINO = Peer("OpenVINO GenAI", "openvino_genai", "openvino-genai", "openvino_worker.py", _openvino_settings)


def importable(pythons: Mapping[Peer, str]) -> list[Peer]:
    """The peers that the interpreter named for each can import.

    Raises ParameterError, saying how to install them, where that is none.
    """
    found = [peer for peer, python in pythons.items() if _can_import(python, peer.module)]
    if found:
        return found
    modules = " or ".join(peer.module for peer in pythons)
    installs = " or ".join(f"`{python} -m pip install {peer.package}`" for peer, python in pythons.items())
    raise ParameterError("peer_python", next(iter(pythons.values())), f"a Python that can import {modules}: {installs}")


def _can_import(python: str, module: str) -> bool:
    try:
        done = subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0
