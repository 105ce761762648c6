"""``shoal complete``: go on with a text."""

from __future__ import annotations

import click

from shoal.cli.options import engine_options, model_argument
from shoal.cli.sampling import read_text, sampling_options, text_options, write_answer
from shoal.params import EngineConfig, SamplingParams


@click.command()
@model_argument()
@click.option("-p", "--prompt", help="The text to go on with. Without it, stdin is read (less one final newline).")
@text_options
@sampling_options
@engine_options
def complete(
    model: str,
    prompt: str | None,
    add_special: bool,
    parse_special: bool,
    params: SamplingParams,
    engine_config: EngineConfig,
) -> None:
    """Go on with a text; what is added goes to stdout as it comes. No chat template is used."""
    from shoal.llm import LLM
    from shoal.system.notices import notices_to

    text = read_text(None).removesuffix("\n") if prompt is None else prompt
    how = {"add_special_tokens": add_special, "parse_special": parse_special}
    with notices_to(lambda notice: click.echo(f"shoal: {notice}", err=True)), LLM(model, config=engine_config) as llm:
        write_answer(llm.stream({"prompt": text, **how}, params))
