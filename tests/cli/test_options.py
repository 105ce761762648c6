"""The shared flags: every one reaches EngineConfig, defaults come from it, and the model is found in either place."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from shoal.cli.options import bench_engine_options, engine_options, model_argument, model_option
from shoal.errors import ParameterError
from shoal.params import EngineConfig

seen: list[Any] = []


@click.command()
@model_argument()
@engine_options
def probe(model: str, engine_config: EngineConfig) -> None:
    seen[:] = [model, engine_config]


@click.command()
@bench_engine_options
def bench_probe(engine_config: EngineConfig) -> None:
    seen[:] = [engine_config]


@click.command()
@model_argument(default=None)
def needs_model(model: str) -> None:
    seen[:] = [model]


def run(command: click.Command, *arguments: str) -> Any:
    return CliRunner().invoke(command, arguments, catch_exceptions=False)


def config(*arguments: str) -> EngineConfig:
    result = run(probe, *arguments)
    assert result.exit_code == 0, result.output
    found: EngineConfig = seen[1]
    return found


def test_no_flags_are_the_defaults() -> None:
    assert config() == EngineConfig()


def test_every_flag_reaches_the_config(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.touch()
    given = {
        "max_model_len": "2k",
        "max_num_seqs": "8",
        "max_num_batched_tokens": "256",
        "kv_cache_memory": "1GiB",
        "kv_cache_dtype": "f32",
        "target_step_ms": "50",
        "speculative_config": '{"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_max": 4}',
        "threads": "2",
        "device": "cuda",
        "gpu_layers": "12",
        "gpu_memory_utilization": "0.5",
        "seed": "-7",
        "pooling_type": "mean",
        "chat_template": str(template),
        "chat_template_kwargs": '{"enable_thinking": false}',
        "tool_call_parser": "mistral",
        "reasoning_parser": "none",
    }
    arguments = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", value)]
    arguments += ["--no-enable-prefix-caching", "--preempt-for-priority"]
    assert config(*arguments) == EngineConfig(
        max_model_len=2048,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        kv_cache_memory=2**30,
        kv_cache_dtype="f32",
        target_step_ms=50,
        speculative_config={"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_max": 4},
        threads=2,
        device="cuda",
        gpu_layers=12,
        gpu_memory_utilization=0.5,
        seed=-7,
        pooling_type="mean",
        chat_template=template,
        chat_template_kwargs={"enable_thinking": False},
        tool_call_parser="mistral",
        reasoning_parser="none",
        enable_prefix_caching=False,
        preempt_for_priority=True,
    )
    offered = {parameter.name for parameter in probe.params}
    offered -= {"model_argument", "model_flags", "draft_model"}
    assert offered == {*given, "enable_prefix_caching", "preempt_for_priority"}
    assert offered <= {field.name for field in fields(EngineConfig)}


@pytest.mark.parametrize("flag", ["--chat-template-kwargs", "--speculative-config"])
@pytest.mark.parametrize("value", ["{", "[1]", "5", ""])
def test_template_arguments_and_speculation_must_be_an_object(flag: str, value: str) -> None:
    result = run(probe, flag, value)
    assert result.exit_code == 2
    assert "JSON" in result.output


def test_a_draft_model_is_short_for_a_speculative_config() -> None:
    spelled_out = {"method": "draft_model", "model": "small.gguf"}
    assert config("--draft-model", "small.gguf") == EngineConfig(speculative_config=spelled_out)
    result = run(probe, "--draft-model", "small.gguf", "--speculative-config", '{"method": "ngram"}')
    assert result.exit_code == 2
    assert "give one of them" in result.output


def test_parsers_have_vllms_names_too() -> None:
    assert config("--reasoning-parser", "deepseek_r1").reasoning_parser == "think"
    assert config("--tool-call-parser", "openai").tool_call_parser == "harmony"
    for flag in ("--reasoning-parser", "--tool-call-parser"):
        with pytest.raises(ParameterError, match=r"_parser: got 'nobody', must be one of .*none"):
            run(probe, flag, "nobody")


def test_a_benchmark_has_a_prefix_cache_only_when_asked() -> None:
    for arguments, expected in (((), False), (("--enable-prefix-caching",), True)):
        assert run(bench_probe, *arguments).exit_code == 0
        assert seen == [EngineConfig(enable_prefix_caching=expected)]


def test_help_shows_the_defaults() -> None:
    text = " ".join(run(probe, "--help").output.split())
    threads = "(the usable cores, or the CPU quota where that is less)"
    for default in ("64", "512", "f16", "auto", "0", threads, "smollm2:135m", "enable-prefix-caching"):
        assert f"[default: {default}]" in text


@pytest.mark.parametrize("flag", ["--max-num-seqs", "--max-model-len", "--max-num-batched-tokens", "--threads"])
@pytest.mark.parametrize("value", ["0", "-1", "1e3", "many", "99999999999"])
def test_numbers_that_are_none_or_too_large_are_refused(flag: str, value: str) -> None:
    if value.lstrip("-").isdigit():
        with pytest.raises(ParameterError, match=flag.strip("-").replace("-", "_")):
            run(probe, flag, value)
    else:
        result = run(probe, flag, value)
        assert result.exit_code == 2
        assert f"{value!r} is not a whole number such as 4096 or 4k" in result.output


def test_other_values_are_refused() -> None:
    assert "'q4_0' is not one of 'f16', 'f32', 'q8_0'" in run(probe, "--kv-cache-dtype", "q4_0").output
    assert "does not exist" in run(probe, "--chat-template", "nosuch.jinja").output
    with pytest.raises(ParameterError, match="kv_cache_memory"):
        run(probe, "--kv-cache-memory", "lots")


@pytest.mark.parametrize(
    ("arguments", "model"),
    [((), "smollm2:135m"), (("a.gguf",), "a.gguf"), (("--model", "a.gguf"), "a.gguf"), (("a", "--model", "a"), "a")],
)
def test_the_model_is_an_argument_or_a_flag(arguments: tuple[str, ...], model: str) -> None:
    assert run(probe, *arguments).exit_code == 0
    assert seen[0] == model


def test_a_model_may_be_required_and_is_given_once() -> None:
    assert "which model?" in run(needs_model).output
    assert run(needs_model, "m").exit_code == 0
    assert seen == ["m"]
    assert "two models given: 'a' and 'b'" in run(needs_model, "a", "--model", "b").output


def test_the_model_may_be_a_flag_alone() -> None:
    @click.command()
    @click.argument("text")
    @model_option()
    def command(text: str, model: str) -> None:
        seen[:] = [text, model]

    assert run(command, "words").exit_code == 0
    assert seen == ["words", "smollm2:135m"]
    assert run(command, "words", "--model", "m").exit_code == 0
    assert seen == ["words", "m"]
    assert "[default: smollm2:135m]" in " ".join(run(command, "--help").output.split())
