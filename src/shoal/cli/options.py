"""The flags that verbs share: which model, and how the engine is sized."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from shoal.errors import ParameterError
from shoal.hub import DEFAULT_MODEL
from shoal.params import DEVICES, POOLINGS, REASONING_PARSERS, TOOL_CALL_PARSERS, EngineConfig, parse_size

Command = Callable[..., Any]


def integer(text: int | str) -> int:
    """A whole number, also written with a suffix: ``4k`` is 4096."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return parse_size("integer", text)
    except ParameterError:
        raise click.BadParameter(f"{text!r} is not a whole number such as 4096 or 4k.") from None


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise click.BadParameter(f"{text!r} is not a JSON object.")
    return value


# One row a flag: type, help, and in words the default that EngineConfig writes as None.
_ENGINE_FLAGS: dict[str, tuple[Any, str, str | None]] = {
    "max_model_len": (integer, "Longest prompt + output, in tokens.", "the model's context, at most 8192"),
    "max_num_seqs": (integer, "Sequences that run at once.", None),
    "max_num_batched_tokens": (integer, "Tokens computed in one step.", None),
    "kv_cache_memory": (
        str,
        "Memory for the KV cache, such as 512MiB.",
        "enough for max-num-seqs, at most 1GiB and 40 % of free memory",
    ),
    "kv_cache_dtype": (
        click.Choice(["f16", "f32", "q8_0"]),
        "Number type of the KV cache; q8_0 takes half of f16.",
        None,
    ),
    "enable_prefix_caching": (bool, "Compute once what prompts begin with in common.", None),
    "preempt_for_priority": (bool, "A request of higher priority takes the place of running ones of lower.", None),
    "target_step_ms": (
        float,
        "Milliseconds that a step should take while requests decode: prompts are cut to fit.",
        "no target",
    ),
    "speculative_config": (
        json_object,
        'JSON object as in vLLM, such as {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_max": 4}.',
        "no speculation",
    ),
    "draft_model": (
        str,
        "A smaller model of the same vocabulary that guesses what comes: short for a --speculative-config with that.",
        "none",
    ),
    "threads": (integer, "Threads that compute.", "the usable cores, or the CPU quota where that is less"),
    "device": (
        click.Choice(DEVICES),
        "What computes; auto takes a GPU that is there, else the CPU; reference is plain NumPy, slow.",
        None,
    ),
    "gpu_layers": (
        str,
        "What of the model the GPU computes: the head, then layers from the last on; auto (as many as fit), all, or a number.",
        None,
    ),
    "gpu_memory_utilization": (float, "Share of the GPU's memory that may be in use.", None),
    "seed": (int, "Where the seeds of requests without one come from.", None),
    "pooling_type": (click.Choice(POOLINGS), "How embeddings are pooled.", "as the model file says"),
    "chat_template": (
        click.Path(exists=True, dir_okay=False, path_type=Path),
        "Jinja file to use instead of the model's chat template.",
        "the model's",
    ),
    "chat_template_kwargs": (
        json_object,
        'JSON object for the chat template, such as {"enable_thinking": false}; requests may say otherwise.',
        "nothing",
    ),
    "tool_call_parser": (
        str,
        f"How tool calls are found in answers: {', '.join(TOOL_CALL_PARSERS)}.",
        "what the chat template shows",
    ),
    "reasoning_parser": (
        str,
        f"How reasoning is found in answers: {', '.join(REASONING_PARSERS)}.",
        "what the chat template shows",
    ),
}


def engine_options(command: Command) -> Command:
    """Add the engine flags; the command gets them as ``engine_config``, an EngineConfig.

    A value that EngineConfig refuses is a ParameterError before the command starts.
    """
    return _with_engine_flags(command, {})


def bench_engine_options(command: Command) -> Command:
    """The same for a benchmark: what it has answered before must cost as much again, so the prefix cache is off unless asked for."""
    return _with_engine_flags(command, {"enable_prefix_caching": False})


def server_engine_options(command: Command) -> Command:
    """The same for a server: clients need not wait for rows of batches that run."""
    return _with_engine_flags(command, {"preempt_for_priority": True})


def _with_engine_flags(command: Command, changed_defaults: dict[str, Any]) -> Command:
    @functools.wraps(command)
    def with_config(*args: Any, **kwargs: Any) -> Any:
        values = {name: kwargs.pop(name) for name in _ENGINE_FLAGS}
        return command(*args, engine_config=EngineConfig(**_spelled_out(values)), **kwargs)

    defaults: dict[str, Any] = {field.name: field.default for field in fields(EngineConfig)} | changed_defaults
    defaults["draft_model"] = None
    decorated: Command = with_config
    for name, (kind, text, default_in_words) in reversed(_ENGINE_FLAGS.items()):
        shown = default_in_words if defaults[name] is None else True
        option = click.option(_spelling(name, kind), type=kind, default=defaults[name], show_default=shown, help=text)
        decorated = option(decorated)
    return decorated


def _spelled_out(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of EngineConfig that flags stand for."""
    draft_model = values.pop("draft_model")
    if draft_model is not None:
        if values["speculative_config"] is not None:
            raise click.UsageError("--draft-model is short for a --speculative-config: give one of them.")
        values["speculative_config"] = {"method": "draft_model", "model": draft_model}
    return values


def _spelling(name: str, kind: Any) -> str:
    flag = name.replace("_", "-")
    return f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}"


def model_argument(default: str | None = DEFAULT_MODEL) -> Callable[[Command], Command]:
    """Add the model, as a first argument or as ``--model``; the command gets it as ``model``.

    ``default`` None makes it required.
    """

    def decorate(command: Command) -> Command:
        @click.argument("model_argument", metavar="MODEL" if default is None else "[MODEL]", required=False)
        @click.option("--model", "model_flags", metavar="MODEL", multiple=True, help=_model_help(default))
        @functools.wraps(command)
        def with_model(*args: Any, model_argument: str | None, model_flags: tuple[str, ...], **kwargs: Any) -> Any:
            given = [model_argument, *model_flags] if model_argument else list(model_flags)
            return command(*args, model=_one_model(given, default), **kwargs)

        return with_model

    return decorate


def model_option(default: str | None = DEFAULT_MODEL) -> Callable[[Command], Command]:
    """Add ``--model`` alone, for verbs whose argument is something else; the command gets it as ``model``."""
    return click.option(
        "--model", metavar="MODEL", default=default, required=default is None, help=_model_help(default)
    )


def _model_help(default: str | None) -> str:
    forms = "A path, a short name such as smollm2:135m, or hf:ORG/REPO:QUANT."
    return forms if default is None else f"{forms}  [default: {default}]"


def _one_model(given: list[str], default: str | None) -> str:
    models = list(dict.fromkeys(given))
    if len(models) > 1:
        verb = click.get_current_context().info_name
        advice = " One server serves one model: start another one on another --port." if verb == "serve" else ""
        raise click.UsageError(f"two models given: {models[0]!r} and {models[1]!r}.{advice}")
    model = models[0] if models else default
    if model is None:
        raise click.UsageError("which model? Give it as the first argument or with --model.")
    return model
