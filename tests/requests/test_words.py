"""Bad words and DRY's breakers as tokens; what they do to text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shoal.kernels.reference_sampling import bits, longer_breakers
from shoal.llm import LLM
from shoal.params import SamplingParams
from shoal.requests.words import WordFinder, bad_word_ids, breakers_of
from tests.support.tiny_model import VOCAB_SIZE, write_tiny_model


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    with LLM(path, device="reference", max_num_seqs=8, max_num_batched_tokens=64) as llm:
        yield llm


class Spellings:
    """A tokenizer of whole words: the longest that fits comes first."""

    def __init__(self, *words: str) -> None:
        self.words = [word.encode() for word in words]
        self.vocab_size = len(words)

    def token_bytes(self, token: int) -> bytes:
        return self.words[token]

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        data, found = text.encode(), []
        while data:
            token = max((t for t, w in enumerate(self.words) if data.startswith(w)), key=lambda t: len(self.words[t]))
            found.append(token)
            data = data[len(self.words[token]) :]
        return found


def test_bad_words_with_and_without_a_space() -> None:
    tokenizer = Spellings("a", " a", "b", " ", " b", "ab")
    assert bad_word_ids(tokenizer, "a") == [(0,), (1,)]  # type: ignore[arg-type]
    assert bad_word_ids(tokenizer, " a") == [(0,), (1,)]  # type: ignore[arg-type]
    assert bad_word_ids(tokenizer, "ab") == [(5,)]  # type: ignore[arg-type]
    assert bad_word_ids(tokenizer, " ") == [(3,)]  # type: ignore[arg-type]


def test_breakers_within_and_across_tokens() -> None:
    tokenizer = Spellings("a", "xa:b", "b", ":", "ba", "cab", "c")
    found = breakers_of(tokenizer, (":", "ab"), 40)  # type: ignore[arg-type]
    assert np.flatnonzero(bits(found.single, 40)).tolist() == [1, 3, 5]
    assert longer_breakers(found) == [[0, 2], [4, 2]]  # what ends with a, then b
    assert np.flatnonzero(bits(found.heads, 40)).tolist() == [0, 1, 3, 4, 5]


def test_no_token_spells_a_breaker() -> None:
    found = breakers_of(Spellings("a", "b"), ("\n",), 40)  # type: ignore[arg-type]
    assert not bits(found.heads, 40).any()
    assert longer_breakers(found) == []


def test_breakers_are_found_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    finder = WordFinder(llm.tokenizer, VOCAB_SIZE)
    params = SamplingParams(dry_multiplier=1)
    first = finder.find(params)
    assert first is not None
    again = finder.find(SamplingParams(dry_multiplier=2, dry_sequence_breakers=list(params.dry_sequence_breakers)))
    assert again is not None
    assert again.breakers is first.breakers
    for number in range(40):
        finder.find(SamplingParams(dry_multiplier=1, dry_sequence_breakers=[str(number)]))
    assert finder.find(params) is not None
    assert finder.find(SamplingParams()) is None
    assert finder.find(SamplingParams(dry_multiplier=1, dry_sequence_breakers=[])) is None


def test_bad_words_never_appear(llm: LLM) -> None:
    letters = [llm.tokenizer.encode(letter, add_special=False)[0] for letter in "abc"] if llm.tokenizer else []
    plain = SamplingParams(seed=1, temperature=9.0, max_tokens=60, ignore_eos=True, allowed_token_ids=letters)
    texts = [
        llm.generate("Hello", replace(plain, bad_words=words), use_tqdm=False)[0].outputs[0].text
        for words in ([], ["ab"], ["c", "aba"])
    ]
    assert all(len(text) == 60 for text in texts)
    assert {"ab", "aba", "c"} <= {word for word in ("ab", "aba", "c") if word in texts[0]}
    assert "ab" not in texts[1]
    assert not {"c", "aba"} & {word for word in ("c", "aba") if word in texts[2]}


def test_words_without_a_tokenizer(llm: LLM) -> None:
    with LLM(llm.path, device="reference", skip_tokenizer_init=True) as bare:
        prompts = [{"prompt_token_ids": [1, 2]}] * 3
        params = [
            SamplingParams(bad_words=["x"]),
            SamplingParams(dry_multiplier=1),
            SamplingParams(dry_multiplier=1, dry_sequence_breakers=[], max_tokens=1),
        ]
        errors = [output.error for output in bare.generate(prompts, params, use_tqdm=False)]
    assert errors[0] is not None
    assert errors[0].startswith("bad_words: needs a tokenizer")
    assert errors[1] is not None
    assert errors[1].startswith("dry_sequence_breakers: needs a tokenizer")
    assert errors[2] is None


def test_ids_that_only_the_model_can_judge(llm: LLM) -> None:
    params = [SamplingParams(logit_bias={VOCAB_SIZE: 1.0}), SamplingParams(logit_bias={65: 100.0}, max_tokens=3)]
    refused, answered = llm.generate(["a", "a"], params, use_tqdm=False)
    assert refused.error is not None
    assert refused.error.startswith("logit_bias")
    assert answered.outputs[0].token_ids == [65] * 3


def test_every_sampler_alone_or_together(llm: LLM) -> None:
    """Batch is solo on a real network too."""
    shared: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}
    params = [
        SamplingParams(**shared, seed=1, presence_penalty=1, repetition_penalty=1.3),
        SamplingParams(**shared, seed=2, dry_multiplier=2, dry_penalty_last_n=-1),
        SamplingParams(**shared, seed=3, mirostat=1),
        SamplingParams(**shared, seed=4, mirostat=2, temperature=0.7),
        SamplingParams(**shared, seed=5, typical_p=0.5, xtc_probability=0.5),
        SamplingParams(**shared, seed=6, samplers="kpt", top_k=5, top_p=0.7, temperature=2.0),
        SamplingParams(**shared, temperature=0, logit_bias={3: 5.0}, repeat_last_n=8, frequency_penalty=0.5),
    ]
    prompts = [f"prompt {number}" for number in range(len(params))]
    together = llm.generate(prompts, params, use_tqdm=False)
    alone = [llm.generate(prompt, one, use_tqdm=False)[0] for prompt, one in zip(prompts, params, strict=True)]
    assert [out.outputs[0].token_ids for out in together] == [out.outputs[0].token_ids for out in alone]
    assert all(len(out.outputs[0].token_ids) == 12 for out in together)
