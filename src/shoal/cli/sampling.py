"""The flags that say how tokens are chosen, and how answers and files of text get in and out."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click
from click.core import ParameterSource

from shoal.cli.options import Command, integer
from shoal.cli.results import write_result
from shoal.errors import RequestError
from shoal.params import SamplingParams, StructuredOutputsParams

if TYPE_CHECKING:
    from shoal.requests.outputs import RequestOutput

_UNTIL_FULL = "up to the end of the context"
_SAMPLING_FLAGS: dict[str, dict[str, Any]] = {
    "max_tokens": {"type": integer, "help": "Most tokens to generate.", "default": None, "show_default": _UNTIL_FULL},
    "temperature": {"type": float, "help": "0 always takes the most likely token."},
    "top_p": {
        "type": float,
        "help": "Keep the most likely tokens with this much probability together; 1 is off, 0 keeps one.",
    },
    "top_k": {"type": int, "help": "Keep this many of the most likely tokens; 0 is off."},
    "min_p": {"type": float, "help": "Drop tokens less likely than this share of the most likely one; 0 is off."},
    "presence_penalty": {"type": float, "help": "Make tokens less likely that the answer has already; -2 to 2."},
    "frequency_penalty": {"type": float, "help": "The same, for each time that the answer has them; -2 to 2."},
    "repetition_penalty": {"type": float, "help": "The same for prompt and answer, as a factor; 1 is off."},
    "repeat_last_n": {
        "type": integer,
        "help": "Tokens that the three penalties look back on; -1 is all.",
        "show_default": "as vLLM",
    },
    "dry_multiplier": {"type": float, "help": "How much DRY makes repetitions less likely; 0 is off."},
    "typical_p": {"type": float, "help": "Keep typical tokens with this much probability together; 1 is off."},
    "top_n_sigma": {"type": float, "help": "Keep logits within so many standard deviations of the best; -1 is off."},
    "xtc_probability": {"type": float, "help": "How often to drop the top choices; 0 is off."},
    "mirostat": {"type": integer, "help": "Keep the surprise of tokens the same, by version 1 or 2; 0 is off."},
    "min_tokens": {"type": integer, "help": "Do not end before this many tokens."},
    "stop": {"type": str, "multiple": True, "help": "End before this text. May be given several times."},
    "ignore_eos": {"is_flag": True, "help": "Go on past end-of-generation tokens."},
}


_CONSTRAINT_FLAGS = {
    "--json-schema": "A JSON schema that the answer follows.",
    "--grammar": "A grammar that the answer follows, in GBNF or Lark.",
}


def sampling_options(command: Command) -> Command:
    """Add the sampling flags; the command gets them as ``params``, a SamplingParams.

    A value that SamplingParams refuses is a ParameterError before the command starts. Seeds come from ``--seed``.
    """

    @functools.wraps(command)
    def with_params(*args: Any, **kwargs: Any) -> Any:
        values = {name: kwargs.pop(name) for name in _SAMPLING_FLAGS}
        constraint = _constraint(kwargs.pop("json_schema"), kwargs.pop("grammar"))
        return command(*args, params=SamplingParams(**values, structured_outputs=constraint), **kwargs)

    defaults = SamplingParams()
    decorated: Command = with_params
    for name, help_text in reversed(_CONSTRAINT_FLAGS.items()):
        decorated = click.option(name, help=help_text)(decorated)
    for name, settings in reversed(_SAMPLING_FLAGS.items()):
        shown = {"default": getattr(defaults, name), "show_default": True, **settings}
        decorated = click.option(f"--{name.replace('_', '-')}", **shown)(decorated)
    return decorated


def _constraint(json_schema: str | None, grammar: str | None) -> StructuredOutputsParams | None:
    if json_schema is None and grammar is None:
        return None
    return StructuredOutputsParams(json=json_schema, grammar=grammar)


def with_model_defaults(params: SamplingParams, defaults: Mapping[str, Any]) -> SamplingParams:
    """``params`` of the running command, with a model's ``defaults`` for the flags that were not given."""
    from shoal.models.sampling_defaults import missing

    context = click.get_current_context()
    unset = (None, ParameterSource.DEFAULT)
    given = [name for name in defaults if context.get_parameter_source(name) not in unset]
    return replace(params, **missing(defaults, given))


def text_options(command: Command) -> Command:
    """Add what says how a text becomes token ids; the command gets ``add_special`` and ``parse_special``."""
    special = "BOS and EOS where the model asks for them."
    decorated = click.option("--parse-special", is_flag=True, help="Spelled control tokens become control tokens.")(
        command
    )
    return click.option("--add-special/--no-add-special", default=True, show_default=True, help=special)(decorated)


def read_text(path: Path | None) -> str:
    """All of a UTF-8 file, or of stdin for None. Raises RequestError where it is not UTF-8."""
    data = stdin().buffer.read() if path is None else path.read_bytes()
    return decoded(data, "stdin" if path is None else str(path))


def stdin() -> TextIO:
    """The standard input. Raises RequestError where it is closed."""
    if sys.stdin is None:
        raise RequestError("stdin is closed")
    return sys.stdin


def decoded(data: bytes, name: str) -> str:
    """``data`` as text, byte for byte. Raises RequestError where it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{name}: not UTF-8 at byte {error.start}: {error.reason}") from None


def write_answer(outputs: Iterable[RequestOutput]) -> str:
    """Write the text of one request to stdout as it grows, then end the line; the text.

    Raises RequestError where the request has failed.
    """
    text = ""
    for output in outputs:
        if output.error is not None:
            raise RequestError(output.error)
        grown = output.outputs[0].text
        write_result(grown[len(text) :], end="")
        text = grown
    if not text.endswith("\n"):
        write_result()
    return text
