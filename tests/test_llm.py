"""LLM from prompts to text, on a tiny model with random weights."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.errors import ContextLengthError, MemoryLimitError, ParameterError, RequestError, UnsupportedError
from shoal.llm import LLM
from shoal.params import EngineConfig, SamplingParams
from shoal.requests.outputs import RequestOutput
from tests.support.tiny_model import END_ID, VOCAB_SIZE, write_tiny_model

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture
def llm(path: Path) -> Iterator[LLM]:
    with LLM(path, device="reference", max_num_seqs=8, max_num_batched_tokens=64) as llm:
        yield llm
        while llm.has_work:
            llm.step()
        stats = llm.engine.stats()
        assert (stats.running, stats.waiting, stats.free_pages) == (0, 0, stats.num_pages)


def text_of(output: RequestOutput) -> str:
    assert output.finished
    assert output.error is None
    return output.outputs[0].text


def test_outputs_are_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["a longer prompt than the others", "b", "cc"]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (3, 9, 1)]
    outputs = llm.generate(prompts, params)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 9, 1]
    assert all(output.outputs[0].finish_reason == "length" for output in outputs)


def test_an_output_tells_how_much_of_its_prompt_was_known(llm: LLM) -> None:
    prompt = {"prompt_token_ids": list(range(40))}
    first, second = (llm.generate([prompt], GREEDY)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 32)
    assert second.outputs[0].token_ids == first.outputs[0].token_ids
    assert llm.generate("", GREEDY)[0].num_cached_tokens == 0


def test_one_prompt_takes_the_path_of_many(llm: LLM) -> None:
    alone = llm.generate("hello", GREEDY)
    among = llm.generate(["x", "hello", "yy"], GREEDY)
    assert len(alone) == 1
    assert alone[0].outputs[0].token_ids == among[1].outputs[0].token_ids


def test_the_text_is_that_of_the_tokens(llm: LLM) -> None:
    assert llm.tokenizer is not None
    for output in llm.generate(["hello", "\u00e9\u00e9"], GREEDY):
        assert text_of(output) == llm.tokenizer.decode(output.outputs[0].token_ids, skip_special=True)
        assert output.prompt_token_ids == llm.tokenizer.encode(output.prompt or "")


def test_tokens_are_the_best_of_the_logits(llm: LLM) -> None:
    """Prefill of the whole text and one token after the other agree: positions, mask, and each token in the cache once."""
    output = llm.generate({"prompt_token_ids": [5, 6, 7, 8, 9]}, GREEDY)[0]
    answer = output.outputs[0].token_ids
    logits = llm.logits([5, 6, 7, 8, 9, *answer[:-1]])
    assert logits[4:].argmax(axis=1).tolist() == answer


def test_a_bad_prompt_harms_no_one(llm: LLM) -> None:
    bad: list[Any] = ["", "\ud800", "x" * 600, {"prompt_token_ids": []}, {"prompt_token_ids": [VOCAB_SIZE]}, {}, 7]
    alone = text_of(llm.generate("good", GREEDY)[0])
    outputs = llm.generate([*bad, "good"], GREEDY)
    assert text_of(outputs[-1]) == alone
    for output in outputs[:-1]:
        assert output.finished
        assert output.error
        assert output.outputs[0].finish_reason == "error"
        assert output.outputs[0].token_ids == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ({"prompt_token_ids": []}, "empty"),
        ("x" * 600, "600 tokens; max_model_len 512 leaves it 511"),
        ("x" * 100_000, "100000 characters is at least 7693 tokens; max_model_len is 512"),
        ({"prompt_token_ids": [1] * 512}, "512 tokens; max_model_len 512"),
        ({"prompt_token_ids": [-1]}, "-1"),
        ({"prompt_token_ids": "12"}, "must be a list of integers"),
        ({"prompt_token_ids": [True]}, "True"),
        ({"prompt_token_ids": [1.5]}, "1.5"),
        ({"text": "x"}, "prompt_token_ids"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "user", "content": "x" * 100_000}]}, "at least 7693 tokens; max_model_len is 512"),
    ],
)
def test_submit_names_what_is_wrong(llm: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        llm.submit(prompt, GREEDY)
    assert isinstance(caught.value, ContextLengthError) == ("max_model_len" in message)
    assert not llm.has_work


def test_an_empty_batch_is_an_error(llm: LLM) -> None:
    for call in (llm.generate, llm.stream, llm.chat):
        with pytest.raises(RequestError, match="batch is empty"):
            call([])


def test_numbers_of_prompts_and_parameters_must_agree(llm: LLM) -> None:
    with pytest.raises(ParameterError, match=r"sampling_params: got '2 items', must be one, or as many .* \(3\)"):
        llm.generate(["a", "b", "c"], [GREEDY, GREEDY])
    with pytest.raises(ParameterError, match="sampling_params"):
        llm.generate(["a"], [{"temperature": 0}])  # type: ignore[list-item]


def test_a_stop_string_ends_the_text_and_frees_the_pages(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    whole = text_of(llm.generate("hello", params)[0])
    stop = whole[5:8]
    cut = whole.find(stop)
    output = llm.generate("hello", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=[stop]))[0]
    assert text_of(output) == whole[:cut]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    assert len(output.outputs[0].token_ids) < 40
    kept = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=stop, include_stop_str_in_output=True)
    assert text_of(llm.generate("hello", kept)[0]) == whole[:cut] + stop


def test_partial_outputs_never_show_part_of_a_stop_string(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    whole = text_of(llm.generate("hello", params)[0])
    stop = whole[5:9]
    stopped = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=stop)
    texts = [output.outputs[0].text for output in llm.stream("hello", stopped)]
    assert texts == sorted(texts, key=len)
    assert all(whole[: whole.find(stop)].startswith(text) for text in texts)
    assert texts[-1] == whole[: whole.find(stop)]


def test_a_stop_token_is_not_part_of_the_output(llm: LLM) -> None:
    whole = llm.generate("hello", GREEDY)[0].outputs[0].token_ids
    stop = whole[4]
    output = llm.generate("hello", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[stop]))
    assert output[0].outputs[0].token_ids == whole[: whole.index(stop)]
    assert (output[0].outputs[0].finish_reason, output[0].outputs[0].stop_reason) == ("stop", stop)


def test_stream_grows_to_what_generate_gives(llm: LLM) -> None:
    prompts = ["hello", "", "world"]
    expected = llm.generate(prompts, GREEDY)
    last: dict[str, RequestOutput] = {}
    for output in llm.stream(prompts, GREEDY):
        before = last.get(output.request_id)
        assert before is None or (not before.finished and output.outputs[0].text.startswith(before.outputs[0].text))
        last[output.request_id] = output
    found = [last[request_id] for request_id in sorted(last, key=int)]
    assert [(item.outputs[0].text, item.error) for item in found] == [
        (item.outputs[0].text, item.error) for item in expected
    ]


def test_leaving_a_stream_aborts_its_requests(llm: LLM) -> None:
    outputs = llm.stream(["a", "b"], SamplingParams(max_tokens=200, ignore_eos=True))
    next(outputs)
    outputs.close()  # type: ignore[attr-defined]
    llm.step()
    stats = llm.engine.stats()
    assert (stats.running, stats.waiting, stats.free_pages) == (0, 0, stats.num_pages)


def test_generate_and_stream_do_not_take_each_others_outputs(llm: LLM) -> None:
    expected = text_of(llm.generate("hello", GREEDY)[0])
    submitted = llm.submit("hello", GREEDY)
    streamed = []
    for output in llm.stream("hello", GREEDY):
        assert text_of(llm.generate("hello", GREEDY)[0]) == expected
        streamed.append(output)
    assert text_of(streamed[-1]) == expected
    ended = []
    while llm.has_work:
        ended += [item for item in llm.step() if item.finished]
    assert [(item.request_id, text_of(item)) for item in ended] == [(submitted, expected)]


def test_an_aborted_request_is_not_reported(llm: LLM) -> None:
    kept, dropped = llm.submit("hello", GREEDY), llm.submit("world", GREEDY, request_id="mine")
    assert dropped == "mine"
    llm.step()
    assert llm.abort("mine")
    assert not llm.abort("mine")
    assert not llm.abort("unknown")
    seen = set()
    while llm.has_work:
        seen |= {output.request_id for output in llm.step()}
    assert seen == {kept}


def test_a_request_id_in_use_is_refused(llm: LLM) -> None:
    llm.submit("hello", GREEDY, request_id="mine")
    with pytest.raises(RequestError, match="'mine' is in use"):
        llm.submit("hello", GREEDY, request_id="mine")
    llm.abort("mine")


def test_time_limits(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    whole = text_of(llm.generate("hello", slow)[0])
    late, good = llm.submit("hello", slow, timeout=1000), llm.submit("hello", GREEDY)
    for _ in range(5):
        llm.step()
    monkeypatch.setattr(llm.engine, "_clock", lambda: time.monotonic() + 1000)
    ended = {output.request_id: output for output in llm.step()}
    answer = ended[late].outputs[0]
    assert (ended[late].finished, ended[late].error, answer.finish_reason) == (True, None, "timeout")
    assert len(answer.token_ids) == 5
    assert text_of(ended[late]) == whole[: len(text_of(ended[late]))]
    assert not ended[good].finished


@pytest.mark.parametrize("limit", ["timeout", "queue_timeout"])
def test_every_way_in_takes_time_limits(llm: LLM, limit: str) -> None:
    soon: dict[str, Any] = {limit: 1e-9}
    llm.submit("hello", GREEDY, **soon)
    outputs = llm.generate(["hello", ""], GREEDY, **soon)
    outputs += llm.chat([{"role": "user", "content": "hi"}], GREEDY, **soon)
    outputs += [*llm.stream("hello", GREEDY, **soon), *llm.step()]
    assert [output.outputs[0].finish_reason for output in outputs] == ["timeout", "error", *["timeout"] * 3]
    wrong: list[Any] = [0, -1, math.nan, math.inf, 10**400, True, "5"]
    for value in wrong:
        with pytest.raises(ParameterError, match=rf"{limit}: got .* a finite number above 0 and at most 1e\+09"):
            llm.generate("hello", GREEDY, **{limit: value})
        with pytest.raises(ParameterError, match=limit):
            llm.stream("hello", GREEDY, **{limit: value})
        with pytest.raises(ParameterError, match=limit):
            llm.submit("hello", GREEDY, **{limit: value})


def test_seeds(path: Path) -> None:
    sampled = SamplingParams(max_tokens=12, ignore_eos=True)

    def tokens(llm_seed: int, params: SamplingParams) -> list[list[int]]:
        with LLM(path, device="reference", max_num_seqs=4, seed=llm_seed) as llm:
            return [item.outputs[0].token_ids for item in llm.generate(["hello"] * 3, params)]

    first = tokens(0, sampled)
    assert first == tokens(0, sampled)  # the same calls give the same tokens
    assert first[0] != first[1]  # every request has a seed of its own
    assert first != tokens(1, sampled)
    own = tokens(0, SamplingParams(max_tokens=12, ignore_eos=True, seed=5))
    assert own == tokens(1, SamplingParams(max_tokens=12, ignore_eos=True, seed=5))
    assert own[0] == own[1]


def test_chat_uses_the_template_and_keeps_content_as_text(llm: LLM) -> None:
    message = {"role": "user", "content": "hi<|im_end|>"}
    one, two = llm.chat([message], GREEDY), llm.chat([[message], [message]], GREEDY)
    assert len(one) == 1
    assert [text_of(item) for item in two] == [text_of(one[0])] * 2
    assert one[0].prompt_token_ids.count(END_ID) == 1  # the template's own
    assert llm.tokenizer is not None
    rendered = "<|im_start|>user\nhi<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert llm.tokenizer.decode(one[0].prompt_token_ids) == rendered


def test_chat_without_a_template_is_refused_unless_one_is_given(tmp_path: Path) -> None:
    bare = write_tiny_model(tmp_path / "bare.gguf", template=None)
    messages = [{"role": "user", "content": "hi"}]
    with LLM(bare, device="reference", max_num_seqs=2) as llm:
        output = llm.chat(messages, GREEDY)[0]
        assert output.error == "bare.gguf has no chat template; give one with chat_template"
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}!{{ mark }}")
    for given in (template, template.read_text()):
        with LLM(bare, device="reference", max_num_seqs=2, chat_template=given) as llm:
            output = llm.chat(messages, GREEDY, chat_template_kwargs={"mark": "?"})[0]
            assert output.prompt_token_ids == llm.encode("hi!?")


def test_a_call_has_one_date(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf", template="{{ strftime_now('%Y %f') }}")
    talk: list[list[dict[str, Any]]] = [[{"role": "user", "content": "hi"}]] * 3
    with LLM(model, device="reference", max_num_seqs=2) as llm:
        assert llm.tokenizer is not None
        prompts = [llm.tokenizer.decode(output.prompt_token_ids) for output in llm.chat(talk, GREEDY)]
        assert prompts == [prompts[0]] * 3
        told = {"strftime_now": datetime(1999, 1, 1)}
        (output,) = llm.chat(talk[0], GREEDY, chat_template_kwargs=told)
        assert llm.tokenizer.decode(output.prompt_token_ids) == "1999 000000"
        bad: list[Any] = [{"strftime_now": "1999"}, ["strftime_now"], 5, {5: 5}]
        for kwargs in bad:
            (output,) = llm.generate([{"messages": talk[0], "chat_template_kwargs": kwargs}], GREEDY)
            assert output.error is not None


def test_a_chat_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_bytes(b"caf\xe9")
    with pytest.raises(
        ParameterError, match=r"chat_template: got '.*template.jinja', must be a text in UTF-8; at byte 3"
    ):
        LLM(write_tiny_model(tmp_path / "tiny.gguf"), device="reference", max_num_seqs=2, chat_template=template)


def test_logits_of_one_and_of_many(llm: LLM) -> None:
    many = llm.logits([[1, 2, 3], [4], list(range(200))])
    assert [rows.shape for rows in many] == [(3, VOCAB_SIZE), (1, VOCAB_SIZE), (200, VOCAB_SIZE)]
    assert many[0].dtype == np.float32
    np.testing.assert_array_equal(llm.logits([1, 2, 3]), many[0])
    np.testing.assert_array_equal(llm.logits(np.arange(200)), many[2])  # type: ignore[call-overload]
    with pytest.raises(RequestError, match="empty"):
        llm.logits([[1], []])
    with pytest.raises(RequestError, match="1000"):
        llm.logits([1000])


def test_logprobs_have_texts(llm: LLM) -> None:
    output = llm.generate("hello", SamplingParams(temperature=0, max_tokens=3, logprobs=2, ignore_eos=True))[0]
    answer = output.outputs[0]
    assert answer.logprobs is not None
    for token, place in zip(answer.token_ids, answer.logprobs, strict=True):
        assert next(iter(place)) == token
        assert place[token].rank == 1
        assert len(place) == 2
        assert llm.tokenizer is not None
        assert place[token].decoded_token == llm.tokenizer.decode([token])


def test_prompt_logprobs_are_those_of_the_logits(llm: LLM) -> None:
    ids = list(range(0, 250, 2))
    logits = llm.logits(ids).astype(np.float64)
    params = SamplingParams(prompt_logprobs=2, max_tokens=3, temperature=0.5, ignore_eos=True)
    beside, output = llm.generate([{"prompt_token_ids": [9, 9, 9]}, {"prompt_token_ids": ids}], [GREEDY, params])
    assert beside.prompt_logprobs is None
    assert len(output.outputs[0].token_ids) == 3
    assert output.outputs[0].logprobs is None
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    for token, place, row in zip(ids[1:], output.prompt_logprobs[1:], logits, strict=False):
        assert place is not None
        row = row - row.max()
        row -= np.log(np.exp(row).sum())
        best = np.argsort(-row, kind="stable")[:2].tolist()
        assert list(place) == list(dict.fromkeys([token, *best]))
        assert [place[i].logprob for i in place] == [row[i] for i in place]
        assert [place[i].rank for i in place] == [int((row >= row[i]).sum()) for i in place]
        assert llm.tokenizer is not None
        assert place[token].decoded_token == llm.tokenizer.token_bytes(token).decode("utf-8", "replace")


def test_a_prompt_can_be_scored_and_nothing_else(llm: LLM) -> None:
    score = SamplingParams(prompt_logprobs=0, max_tokens=0)
    longest = {"prompt_token_ids": [5] * llm.engine.max_model_len}
    outputs = llm.generate(["hello", "h", longest, {"prompt_token_ids": [5] * 513}], score)
    assert [len(output.prompt_logprobs or ()) for output in outputs] == [5, 1, 512, 0]
    for output in outputs[:3]:
        assert output.finished
        assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == ([], "length")
    assert "513 tokens; max_model_len 512 leaves it 512" in (outputs[3].error or "")
    partial = list(llm.stream("hello", score))
    assert [output.prompt_logprobs for output in partial] == [outputs[0].prompt_logprobs]


def test_streamed_outputs_all_hold_the_prompt_logprobs(llm: LLM) -> None:
    outputs = list(llm.stream("hello", SamplingParams(prompt_logprobs=1, temperature=0, max_tokens=4, ignore_eos=True)))
    assert len(outputs) == 4
    assert all(output.prompt_logprobs == outputs[0].prompt_logprobs for output in outputs)
    assert len(outputs[0].prompt_logprobs or ()) == 5


@pytest.mark.parametrize(("field", "value"), [("prompt_logprobs", -1), ("prompt_logprobs", 21), ("max_tokens", 0)])
def test_limits_of_prompt_logprobs(field: str, value: int) -> None:
    with pytest.raises(ParameterError, match=f"{field}: got {value}"):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_without_a_tokenizer_there_are_only_ids(path: Path) -> None:
    with LLM(path, device="reference", max_num_seqs=2, skip_tokenizer_init=True) as llm:
        output = llm.generate([{"prompt_token_ids": [1, 2]}], GREEDY)[0]
        assert (output.outputs[0].text, len(output.outputs[0].token_ids)) == ("", 12)
        with pytest.raises(RequestError, match="skip_tokenizer_init"):
            llm.submit("text", GREEDY)


def test_flags(path: Path) -> None:
    with pytest.raises(ParameterError, match=r"max_seqs: got 4, must be left out: no such engine flag .*max_num_seqs"):
        LLM(path, max_seqs=4)
    with pytest.raises(ParameterError, match="config"):
        LLM(path, config=EngineConfig(), max_num_seqs=4)
    with pytest.raises(ParameterError, match="max_num_seqs"):
        LLM(path, max_num_seqs=0)


def test_a_file_without_a_tokenizer_says_how_to_open_it(golden: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"'no_vocab' is not supported.*skip_tokenizer_init=True"):
        LLM(golden / "archs/llama.gguf", device="reference")


def test_closing_twice_and_using_a_closed_one(path: Path) -> None:
    llm = LLM(path, device="reference", max_num_seqs=2)
    llm.submit("hello", GREEDY)
    llm.close()
    llm.close()
    assert not llm.has_work


# --- several answers to one prompt


def test_each_sample_is_what_a_request_of_its_own_would_give(llm: LLM) -> None:
    params = SamplingParams(n=4, max_tokens=6, seed=5, ignore_eos=True)
    (output,) = llm.generate("hello", params)
    assert [answer.index for answer in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(answer.token_ids) for answer in output.outputs}) == 4
    (alone,) = llm.generate("hello", SamplingParams(n=1, max_tokens=6, seed=5, ignore_eos=True))
    assert alone.outputs[0] == output.outputs[0]
    assert llm.generate(["x", "hello"], [GREEDY, params])[1].outputs == output.outputs


def test_a_stop_string_ends_its_own_sample_alone(llm: LLM) -> None:
    params = SamplingParams(n=4, max_tokens=30, seed=5, ignore_eos=True)
    free = llm.generate("hello", params)[0].outputs
    stop = free[1].text[3:6]
    cut = llm.generate("hello", replace(params, stop=[stop]))[0].outputs
    assert [answer.text for answer in cut] == [answer.text.split(stop)[0] for answer in free]
    assert [answer.finish_reason for answer in cut] == ["stop" if stop in answer.text else "length" for answer in free]
    assert len({answer.finish_reason for answer in cut}) == 2


def test_samples_stream_apart(llm: LLM) -> None:
    last = None
    for output in llm.stream("hello", SamplingParams(n=3, max_tokens=4, seed=5, ignore_eos=True)):
        assert [len(answer.token_ids) for answer in output.outputs] == [len(output.outputs[0].token_ids)] * 3
        last = output
    assert last is not None
    assert last.finished
    assert last.outputs == llm.generate("hello", SamplingParams(n=3, max_tokens=4, seed=5, ignore_eos=True))[0].outputs


def test_an_abort_is_that_of_all_samples(llm: LLM) -> None:
    name = llm.submit("hello", SamplingParams(n=3, max_tokens=400, ignore_eos=True))
    llm.step()
    assert llm.abort(name)
    assert not llm.has_work or llm.step() == []
    assert llm.engine.stats().running == 0


# --- priorities


@pytest.fixture
def narrow(path: Path) -> Iterator[LLM]:
    """One sequence at a time."""
    with LLM(path, device="reference", max_num_seqs=1) as llm:
        yield llm


@pytest.mark.parametrize(("priority", "order"), [(0, "0123"), ([3, 1, 2, 1], "1320")])
def test_the_lowest_priority_number_comes_first(narrow: LLM, priority: int | list[int], order: str) -> None:
    ends = [output.request_id for output in narrow.stream(list("abcd"), GREEDY, priority=priority) if output.finished]
    assert "".join(ends) == order


def test_one_request_may_have_a_priority(narrow: LLM) -> None:
    for name, priority in (("later", 5), ("sooner", -5)):
        narrow.submit("x", GREEDY, request_id=name, priority=priority)
    ends = []
    while narrow.has_work:
        ends += [output.request_id for output in narrow.step() if output.finished]
    assert ends == ["sooner", "later"]


@pytest.mark.parametrize("priority", [[1], [1, 2, 3], [1, "2"], 0.5, True, 2**63])
def test_wrong_priorities_are_refused(llm: LLM, priority: Any) -> None:
    with pytest.raises(ParameterError, match=r"^priority: "):
        llm.generate(["a", "b"], GREEDY, priority=priority)
    with pytest.raises(ParameterError, match=r"^priority: "):
        llm.generate(iter(["a", "b"]), GREEDY, priority=priority)
    with pytest.raises(ParameterError, match=r"^priority: "):
        llm.submit("a", GREEDY, priority=priority)


# --- other sizes


def test_sizes_change_while_requests_are_under_way(llm: LLM) -> None:
    params = [SamplingParams(n=2, seed=seed, max_tokens=20, ignore_eos=True) for seed in range(4)]
    expected = llm.generate(list("abcd"), params)
    weights, found = llm.engine._model, {}
    for name, prompt in enumerate("abcd"):
        llm.submit(prompt, params[name], request_id=str(name))
    sizes: list[dict[str, Any]] = [
        {"max_num_seqs": 3},
        {"kv_cache_memory": "64KiB", "max_num_batched_tokens": 5},
        {"max_num_seqs": 16},
    ]
    for size in (*sizes, *[{}] * 200):
        for output in llm.step() if llm.has_work else []:
            found[output.request_id] = output.outputs
        llm.resize(**size)
    assert [found[str(name)] for name in range(4)] == [output.outputs for output in expected]
    assert llm.engine._model is weights
    assert (llm.config.max_num_seqs, llm.config.max_num_batched_tokens) == (16, 5)
    assert llm.engine.memory_plan.kv_bytes <= 64 * 1024


@pytest.mark.parametrize("size", [{"max_num_seqs": 0}, {"kv_cache_memory": "much"}, {"max_num_batched_tokens": 1.5}])
def test_wrong_sizes_are_refused(llm: LLM, size: dict[str, Any]) -> None:
    before = llm.config
    with pytest.raises(ParameterError, match=next(iter(size))):
        llm.resize(**size)
    assert llm.config is before


def test_too_little_memory_for_a_page_is_refused_with_both_numbers(llm: LLM) -> None:
    before = llm.config
    with pytest.raises(MemoryLimitError, match=r"one page needs \d+ bytes, 10 bytes are given"):
        llm.resize(kv_cache_memory=10)
    assert llm.config is before
    assert text_of(llm.generate("x", GREEDY)[0])
