"""Callers with requests of their own on one model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shoal.llm import LLM
from shoal.params import BeamSearchParams, SamplingParams
from shoal.requests.pooled import EmbeddingRequestOutput
from shoal.requests.session import Session
from shoal.requests.submission import Limits
from tests.support.tiny_model import write_tiny_model

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    with LLM(path, device="reference", max_num_seqs=8, max_model_len=64) as llm:
        yield llm


def texts(session: Session, count: int) -> dict[str, str]:
    found: dict[str, str] = {}
    while len(found) < count:
        found |= {output.request_id: output.outputs[0].text for output in session.step() if output.finished}
    return found


def test_each_hears_of_its_own_alone_though_the_names_are_the_same(llm: LLM) -> None:
    first, second = llm.session(prefix="first:"), llm.session(prefix="second:")
    for session, prompt in ((first, "one"), (second, "two")):
        assert session.submit(prompt, PARAMS, request_id="r") == "r"
    alone = [output.outputs[0].text for output in llm.generate(["one", "two"], PARAMS, use_tqdm=False)]
    assert texts(second, 1) == {"r": alone[1]}
    assert texts(first, 1) == {"r": alone[0]}
    assert not llm.has_work


def test_an_abort_is_of_its_own_request(llm: LLM) -> None:
    first, second = llm.session(prefix="first:"), llm.session(prefix="second:")
    for session in (first, second):
        session.submit("one", PARAMS, request_id="r")
    assert first.abort("r")
    assert not first.abort("r")
    assert texts(second, 1).keys() == {"r"}
    assert first.step() == []


def test_one_that_computes_nothing_itself_gets_what_others_steps_brought(llm: LLM) -> None:
    waiting = llm.session(prefix="w:", advance=llm.taken)
    waiting.submit("one", PARAMS, request_id="r")
    assert waiting.step() == []
    before = llm.engine.stats().steps
    llm.generate(["two"], PARAMS, use_tqdm=False)
    assert llm.engine.stats().steps > before
    assert texts(waiting, 1).keys() == {"r"}


def test_what_is_prepared_waits_for_nothing_until_it_enters(llm: LLM) -> None:
    session = llm.session(prefix="p:")
    prepared = session.prepare("one", PARAMS, limits=Limits(), request_id="r")
    assert not llm.has_work
    session.enter(prepared)
    assert texts(session, 1).keys() == {"r"}


def test_beam_searches_and_embeddings_go_by_name_too(llm: LLM) -> None:
    session = llm.session(prefix="b:")
    assert session.submit("one", BeamSearchParams(2, 3), request_id="r") == "r"
    assert texts(session, 1).keys() == {"r"}
    assert session.submit_embedding("one", request_id="e") == "e"
    embeddings: list[EmbeddingRequestOutput] = []
    while not embeddings:
        session.step()
        embeddings = session.embeddings()
    assert [(output.request_id, output.error) for output in embeddings] == [("e", None)]
