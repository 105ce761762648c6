"""``shoal perplexity``: how well a model predicts a text, by the method of llama.cpp's llama-perplexity."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click

from shoal.cli.options import bench_engine_options, integer, model_argument
from shoal.cli.results import write_result
from shoal.cli.sampling import read_text
from shoal.errors import ParameterError
from shoal.params import EngineConfig

_MIN_CTX = 4


@click.command()
@model_argument()
@click.option(
    "-f", "--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The text; else stdin."
)
@click.option("--ctx-size", type=integer, default=512, show_default=True, help="Tokens in a chunk.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@bench_engine_options
def perplexity(model: str, file: Path | None, ctx_size: int, as_json: bool, engine_config: EngineConfig) -> None:
    """Print the perplexity of a text: lower means that the model predicts it better."""
    from shoal.bench.perplexity import facts, score_text
    from shoal.llm import LLM

    if ctx_size < _MIN_CTX:
        raise ParameterError("ctx_size", ctx_size, f"at least {_MIN_CTX}")
    text = read_text(file)
    if engine_config.max_model_len is None:
        engine_config = replace(engine_config, max_model_len=ctx_size)
    with LLM(model, config=engine_config) as llm:
        score = score_text(llm, text, ctx_size)
    write_result(json.dumps(facts(score)) if as_json else f"PPL = {score.ppl:.4f} +/- {score.stderr:.5f}")
