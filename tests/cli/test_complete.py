"""``shoal complete``, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.llm import LLM
from shoal.params import SamplingParams
from tests.cli.conftest import Shoal
from tests.support.tiny_model import write_tiny_model

FLAGS = ("--device", "reference", "--temperature", "0", "--max-tokens", "12", "--ignore-eos")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny.gguf")


@pytest.fixture
def expected(model: Path) -> str:
    with LLM(model, device="reference", max_num_seqs=1) as llm:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        return llm.generate("hello", params)[0].outputs[0].text


def test_the_text_goes_on_where_the_prompt_ended(shoal: Shoal, model: Path, expected: str) -> None:
    done = shoal("complete", model, "-p", "hello", *FLAGS)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected + "\n", "")


def test_the_prompt_may_come_from_stdin(shoal: Shoal, model: Path, expected: str) -> None:
    assert shoal("complete", model, *FLAGS, stdin="hello\n").stdout == expected + "\n"


def test_control_tokens_are_parsed_where_asked_for_and_said_where_not(shoal: Shoal, model: Path) -> None:
    prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    with LLM(model, device="reference", max_num_seqs=1) as llm:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        expected = llm.chat([{"role": "user", "content": "hello"}], params)[0].outputs[0].text
    parsed = shoal("complete", model, "-p", prompt, *FLAGS, "--parse-special", "--no-add-special")
    assert (parsed.stdout, parsed.stderr) == (expected + "\n", "")
    plain = shoal("complete", model, "-p", prompt, *FLAGS)
    assert plain.stderr.startswith("shoal: a prompt spells the control token '<|im_start|>', which is taken as text")
    assert plain.stderr.count("\n") == 1


def test_stop_strings_end_it(shoal: Shoal, model: Path, expected: str) -> None:
    stop = expected[4:6]
    done = shoal("complete", model, "-p", "hello", *FLAGS, "--stop", stop, "--stop", "never said")
    assert done.stdout == expected[: expected.find(stop)] + "\n"


def test_without_max_tokens_it_goes_on_to_the_end_of_the_context(shoal: Shoal, model: Path) -> None:
    flags = ("--device", "reference", "--temperature", "0", "--ignore-eos", "--max-model-len", "20", "--json")
    done = shoal("complete", model, "-p", "hello", *flags[:-1])
    with LLM(model, device="reference", max_model_len=20) as llm:
        params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        output = llm.generate("hello", params)[0].outputs[0]
    assert len(output.token_ids) == 15
    assert done.stdout == output.text + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", ""), "the prompt is empty"),
        (("-p", "x", "--temperature", "nan"), "temperature: got nan"),
        (("-p", "x", "--top-p", "1.5"), "top_p: got 1.5"),
        (("-p", "x" * 600), "max_model_len 512"),
        (("-p", "x", "--max-model-len", "100000"), "max_model_len: got 100000"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    shoal: Shoal, model: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = shoal("complete", model, "--device", "reference", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_stdin_that_is_not_text_is_named(model: Path) -> None:
    from click.testing import CliRunner

    from shoal.cli.complete import complete
    from shoal.errors import RequestError

    result = CliRunner().invoke(complete, [str(model)], input=b"ab\xff")
    assert isinstance(result.exception, RequestError)
    assert "stdin: not UTF-8 at byte 2" in str(result.exception)


def test_the_answer_follows_a_schema_or_a_grammar(shoal: Shoal, model: Path) -> None:
    flags = ("--device", "reference", "--max-tokens", "40")
    schema = '{"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": false}'
    assert json.loads(shoal("complete", model, "-p", "x", *flags, "--json-schema", schema).stdout) == {"a": 1}
    assert shoal("complete", model, "-p", "x", *flags, "--grammar", 'root ::= "yes"').stdout == "yes\n"
    done = shoal("complete", model, "-p", "x", *flags, "--json-schema", '{"uniqueItems": true}')
    assert done.returncode == 2
    assert "'uniqueItems at #', must be left out" in done.stderr
    both = shoal("complete", model, "-p", "x", *flags, "--json-schema", "{}", "--grammar", 'root ::= "yes"')
    assert both.returncode == 2
