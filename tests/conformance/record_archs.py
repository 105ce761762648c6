"""Record what llama.cpp computes for the models of ``tests/support/tiny_archs.py``, into ``tests/conformance/archs``.

It needs llama-cpp-python (0.3.36 made what is there), which is no dependency of shoal; run it where that is installed, from the root of
the repository, with the names of the models that are new or changed (none: all):

    PYTHONPATH=src:. python -m tests.conformance.record_archs starcoder olmo

F32 KV cache, no flash attention, one thread, all positions of one batch.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from tests.support.tiny_archs import CONTEXT, TINY_ARCHS, VOCAB, digest, tokens

FOLDER = Path(__file__).parent / "archs"


def llama_logits(path: Path, ids: list[int]) -> NDArray[np.float32]:
    """What llama.cpp computes for all positions: [tokens, vocabulary]."""
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise SystemExit(f"llama.cpp refuses {path}")
    context = llama_cpp.llama_init_from_model(model, _context_params())
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    if llama_cpp.llama_decode(context, batch):
        raise SystemExit(f"llama.cpp fails on {path}")
    rows = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (VOCAB,)).copy() for i in range(len(ids))]
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return np.stack(rows)


def _context_params() -> llama_cpp.llama_context_params:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, CONTEXT, CONTEXT
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return params


def record(name: str, folder: Path) -> None:
    """Make one model and keep its logits, next to what its file is known by."""
    path = TINY_ARCHS[name].write(folder / f"{name}.gguf")
    logits = llama_logits(path, tokens())
    np.savez_compressed(FOLDER / f"{name}.npz", logits=logits, digest=digest(path))
    print(f"{name}: standard deviation {logits.std():.2f}")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for chosen in sys.argv[1:] or TINY_ARCHS:
            record(chosen, Path(temporary))
