"""Record what llama.cpp makes of the encoders in ``tests/support/tiny_encoders.py``, and the states of some decoders, into
``tests/conformance/encoders``.

It needs llama-cpp-python, as ``record_archs``; run it where that is installed, from the root of the repository, with the names of the
models that are new or changed (none: all):

    PYTHONPATH=src:. python -m tests.conformance.record_encoders bert

``states``: of every token (pooling none). ``pooled``: what the file's own pooling gives, a decoder's last, not normalised.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from tests.support.tiny_archs import CONTEXT, digest, tokens
from tests.support.tiny_encoders import EMBEDDING, LAST, NONE, RANK, TinyEncoder

FOLDER = Path(__file__).parent / "encoders"


def llama_embedding(path: Path, ids: list[int], pooling: int) -> NDArray[np.float32]:
    """[tokens, width] with pooling none, otherwise [width], or [1] for a score."""
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise SystemExit(f"llama.cpp refuses {path}")
    context = llama_cpp.llama_init_from_model(model, _context_params(pooling))
    wide = llama_cpp.llama_model_n_embd(model)
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    if llama_cpp.llama_decode(context, batch):
        raise SystemExit(f"llama.cpp fails on {path}")
    if pooling == NONE:
        rows = [llama_cpp.llama_get_embeddings_ith(context, i) for i in range(len(ids))]
        found = np.stack([np.ctypeslib.as_array(row, (wide,)).copy() for row in rows])
    else:
        width = 1 if pooling == RANK else wide
        found = np.ctypeslib.as_array(llama_cpp.llama_get_embeddings_seq(context, 0), (width,)).copy()
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return found


def _context_params(pooling: int) -> llama_cpp.llama_context_params:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, CONTEXT, CONTEXT
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.embeddings, params.pooling_type = True, pooling
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return params


def record(name: str, folder: Path) -> None:
    """Make one model and keep its states and their pooling, next to what its file is known by."""
    tiny = EMBEDDING[name]
    path, pooling = tiny.write(folder / f"{name}.gguf"), tiny.pooling if isinstance(tiny, TinyEncoder) else LAST
    assert pooling is not None, "all of them say how they pool"
    states = llama_embedding(path, tokens(), NONE)
    pooled = llama_embedding(path, tokens(), pooling)
    np.savez_compressed(FOLDER / f"{name}.npz", states=states, pooled=pooled, digest=digest(path))
    print(f"{name}: standard deviation {states.std():.2f}, pooled {pooled.reshape(-1)[:2]}")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for chosen in sys.argv[1:] or EMBEDDING:
            record(chosen, Path(temporary))
