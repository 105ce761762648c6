"""``shoal complete``: go on with a text."""

from __future__ import annotations

import click

from shoal.cli.options import engine_options, model_argument
from shoal.cli.sampling import read_text, sampling_options, write_answer
from shoal.params import EngineConfig, SamplingParams


@click.command()
@model_argument()
@click.option("-p", "--prompt", help="The text to go on with. Without it, stdin is read (less one final newline).")
@sampling_options
@engine_options
def complete(model: str, prompt: str | None, params: SamplingParams, engine_config: EngineConfig) -> None:
    """Go on with a text; what is added goes to stdout as it comes. No chat template is used."""
    from shoal.llm import LLM

    text = read_text(None).removesuffix("\n") if prompt is None else prompt
    with LLM(model, config=engine_config) as llm:
        write_answer(llm.stream(text, params))
