"""``shoal bench speculative``: what guesses gain, with the same answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shoal.cli.bench_options import POSITIVE, numbers, output_json_option, show
from shoal.cli.options import bench_engine_options, model_argument
from shoal.params import EngineConfig, SamplingParams, SpeculativeConfig

if TYPE_CHECKING:
    from shoal.bench.speculative import SpeculativeResult

_GUESSES = {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 4, "prompt_lookup_min": 2}


@click.command()
@model_argument()
@click.option(
    "--workload",
    type=click.Choice(["copying", "chat", "replay"]),
    multiple=True,
    default=("copying", "chat"),
    show_default=True,
    help="copying: code to change and lines to find. chat: short questions. replay: random prompts, and guesses that are as often"
    " right as --acceptance says.",
)
@click.option("--acceptance", type=numbers(0, 100), default="50,70,90", show_default=True, help="Percent.")
@click.option("--num-prompts", type=POSITIVE, default=40, show_default=True, help="Requests of a workload.")
@click.option("--batch-size", type=POSITIVE, default=1, show_default=True, help="Requests at once.")
@click.option("--input-len", type=POSITIVE, default=32, show_default=True, help="Tokens of a random prompt.")
@click.option("--output-len", type=POSITIVE, default=200, show_default=True, help="Tokens of an answer at most.")
@click.option("--rounds", type=POSITIVE, default=10, show_default=True, help="Pairs, one after the other.")
@output_json_option
@bench_engine_options
def speculative(
    model: str,
    workload: tuple[str, ...],
    acceptance: tuple[int, ...],
    num_prompts: int,
    batch_size: int,
    input_len: int,
    output_len: int,
    rounds: int,
    output_json: Path | None,
    engine_config: EngineConfig,
) -> None:
    """The same greedy answers without and with guesses, in turns: how many times the tokens a second.

    The guesses are those of --speculative-config, by default n-grams. Of the prompts of copying those count whose answer without
    guesses does not loop: no 8 tokens in a row come three times in it.
    """
    from shoal.bench import copying
    from shoal.bench.speculative import Asked, Replay, measure_speculative, remember, without_loops
    from shoal.bench.workload import random_prompts
    from shoal.llm import LLM

    guesses = replace(engine_config, speculative_config=engine_config.speculative_config or _GUESSES)
    guessed = guesses.speculative_config
    assert isinstance(guessed, SpeculativeConfig), "a config makes one of whatever it was given"
    plain_config = replace(engine_config, speculative_config=None)
    params = SamplingParams(temperature=0, max_tokens=output_len)
    sizes: dict[str, Any] = {"batch_size": batch_size, "rounds": rounds}
    results: dict[str, SpeculativeResult] = {}
    with LLM(model, config=plain_config) as plain:
        for name in [one for one in ("copying", "chat") if one in workload]:
            texts = copying.copying() if name == "copying" else copying.questions()
            asked: list[Asked] = [{"messages": [{"role": "user", "content": text}]} for text in texts]
            kept = without_loops(plain, asked, params, num_prompts) if name == "copying" else asked[:num_prompts]
            with LLM(model, config=guesses) as guessing:
                results[name] = measure_speculative(plain, guessing, kept, params, **sizes)
        for share in acceptance if "replay" in workload else ():
            fixed, drawn = replace(params, ignore_eos=True), list[Asked](random_prompts(plain, num_prompts, input_len))
            replay = Replay(guessed.num_speculative_tokens, share / 100, plain.vocab_size)
            remember(plain, replay, drawn, fixed)
            with LLM(model, config=guesses, drafter=replay) as guessing:
                results[f"replay at {share} %"] = measure_speculative(plain, guessing, drawn, fixed, **sizes)
    text = "\n".join(f"{name}: {result}" for name, result in results.items())
    show(text, {name: result.as_json() for name, result in results.items()}, output_json)
