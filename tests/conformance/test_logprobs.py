"""Log-probabilities against the log-softmax of llama.cpp's logits, and raw whatever else a request asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.params import SamplingParams
from tests.conformance.test_archs import GELU, SILU, golden_logits, load

TOP = 5
SHAPED = SamplingParams(  # none of it changes what is reported
    prompt_logprobs=TOP,
    logprobs=TOP,
    max_tokens=3,
    ignore_eos=True,
    temperature=0.3,
    seed=1,
    repetition_penalty=1.7,
    presence_penalty=0.5,
    logit_bias={3: -5.0},
    allowed_token_ids=list(range(40)),
    top_p=0.4,
)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    scores = logits.astype(np.float64)
    scores -= scores.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    return result


@pytest.mark.parametrize("name", SILU + GELU)
def test_logprobs_are_those_of_raw_logits(golden: Path, name: str) -> None:
    """To 1e-3 llama.cpp's for the SiLU architectures, to 1e-5 our own for all; of the prompt and of the answer."""
    tokens, expected = golden_logits(golden, name)
    with load(golden, name, "cpu", "f32", 64) as llm:
        (output,) = llm.generate([{"prompt_token_ids": tokens}], SHAPED, use_tqdm=False)
        answer = output.outputs[0].token_ids
        own = log_softmax(llm.logits([*tokens, *answer]))
    assert set(answer) <= set(range(40))
    assert output.prompt_logprobs is not None
    assert output.outputs[0].logprobs is not None
    golden_logprobs = log_softmax(expected)
    places = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    for position, (token, place) in enumerate(zip([*tokens[1:], *answer], places, strict=True)):
        assert place is not None
        assert token in place
        assert len(place) in (TOP, TOP + 1)
        for known, found in place.items():
            assert found.logprob == pytest.approx(own[position, known], abs=1e-5)
            if name in SILU and position < len(golden_logprobs):
                assert found.logprob == pytest.approx(golden_logprobs[position, known], abs=1e-3)
