"""llama.cpp's own quantiser, through llama-cpp-python.

    python llama_quantize.py MODEL TYPE OUT THREADS

A script that stands alone: it runs in the interpreter that has llama-cpp-python, which need not have shoal. It ends with what
went wrong as the last line of stderr.
"""

from __future__ import annotations

import sys

import llama_cpp

_PREFIXES = ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_")


def file_types() -> dict[str, int]:
    """The types of file that this llama.cpp makes, as in "Q4_K_M"."""
    return {
        name.removeprefix(prefix): getattr(llama_cpp, name)
        for name in dir(llama_cpp)
        for prefix in _PREFIXES
        if name.startswith(prefix)
    }


def main() -> None:
    """Write OUT; a model that is quantised already is quantised again."""
    model, type_name, out, threads = sys.argv[1:]
    types = file_types()
    if type_name not in types:
        sys.exit(f"this llama.cpp knows {', '.join(sorted(types))}")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = types[type_name], int(threads), True
    sys.exit(llama_cpp.llama_model_quantize(model.encode(), out.encode(), params))


if __name__ == "__main__":
    main()
