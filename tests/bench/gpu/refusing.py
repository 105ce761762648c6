"""A process in which only some packages can be imported. ``python refusing.py whole|bare ARGUMENT...`` runs ``shoal bench gpu``: bare
as it is, whole with the reference in the place of the GPU's backend."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import FrameType

ALLOWED = {"numpy", "numba", "llvmlite", "torch", "triton", "shoal"}
# What shoal needs otherwise and torch does not: also refused where torch would take it if it is there.
REFUSED = {
    *("click", "gguf", "httptools", "huggingface_hub", "llguidance", "msgspec", "platformdirs", "prometheus_client"),
    *("psutil", "rich", "sentencepiece", "starlette", "tokenizers", "uvicorn", "uvloop"),
}


class Refuse:
    """First on the meta path."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        package = name.partition(".")[0]
        if package in REFUSED or (package not in ALLOWED | sys.stdlib_module_names and _importer() == "shoal"):
            raise ImportError(f"{name} is refused")
        return None


def _importer() -> str:
    """The package of the module with the import statement."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("importlib"):
        frame = frame.f_back
    return "" if frame is None else str(frame.f_globals.get("__name__", "")).partition(".")[0]


if __name__ == "__main__":
    sys.meta_path.insert(0, Refuse())
    from shoal.__main__ import main

    how, *arguments = sys.argv[1:]
    if how == "whole":
        from shoal.bench.gpu import main as bench
        from shoal.kernels.reference import ReferenceBackend

        vars(bench)["load_backend"] = lambda device, **settings: ReferenceBackend()
    sys.exit(main(["bench", "gpu", *arguments]))
