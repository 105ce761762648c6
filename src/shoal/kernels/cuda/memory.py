"""What is said when the GPU's memory is too small: what was to be placed there, how much that is, what is free, and what helps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shoal.errors import MemoryLimitError
from shoal.kernels.cuda.launch import device, on_gpu

_ASKED = re.compile(r"Tried to allocate ([\d.]+ \w+)")  # in torch's message
_REMEDY = (
    "give the GPU fewer layers (--gpu-layers N), leave more of it free (a lower --gpu-memory-utilization), or take a smaller"
    " --max-model-len, --max-num-seqs or --max-num-batched-tokens"
)


@contextmanager
def placing(what: str, num_bytes: int | None = None) -> Iterator[None]:
    """Raise MemoryLimitError where ``what`` (of so many bytes, if they are known) does not fit."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError, and what drivers say through Triton or a captured graph
        if "out of memory" not in str(error).lower():
            raise
        asked = _asked(str(error)) if num_bytes is None else f"{num_bytes} bytes"
        raise MemoryLimitError(f"GPU memory: no room for {what}{_sizes(asked, free_bytes())}; {_REMEDY}") from None


def free_bytes() -> int | None:
    """Of the device, by its driver; None where there is none."""
    return int(torch.cuda.mem_get_info(device())[0]) if on_gpu() else None


def _asked(message: str) -> str:
    match = _ASKED.search(message)
    return match[1] if match else ""


def _sizes(asked: str, free: int | None) -> str:
    known = [f"{asked} asked for"] if asked else []
    known += [] if free is None else [f"{free} bytes free"]
    return f" ({', '.join(known)})" if known else ""
