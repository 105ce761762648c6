"""``shoal bench serve``: requests to a server at a rate, or so many at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shoal.cli.bench_load_options import (
    NOT_NEGATIVE,
    arrival_options,
    sampling_options,
    selection_options,
    shape_options,
    target_options,
)
from shoal.cli.bench_options import POSITIVE, output_json_option, show

if TYPE_CHECKING:
    from shoal.bench.serve.measure import ServePlan, Target
    from shoal.bench.serve.report import ServeResult

    Results = Mapping[str, Sequence[ServeResult]]


def _others(ctx: click.Context, param: click.Parameter, pairs: Sequence[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for pair in pairs:
        name, _, url = pair.partition("=")
        if not name or not url or name in named:
            raise click.BadParameter(f"{pair!r} is not NAME=URL with a name of its own.")
        named[name] = url
    return named


@click.command()
@target_options
@click.option("--num-prompts", type=POSITIVE, default=1000, show_default=True, help="Requests.")
@arrival_options
@click.option("--dataset-name", type=click.Choice(["random"]), default="random", show_default=True)
@shape_options(input_len=1024, output_len=128, range_ratio=0.0)
@click.option("--vocab-size", type=POSITIVE, help="Token ids are below it.  [default: as the server says]")
@sampling_options
@click.option("--seed", type=NOT_NEGATIVE, default=0, show_default=True, help="Chooses prompts and times.")
@click.option("--num-warmups", type=NOT_NEGATIVE, default=0, show_default=True, help="Requests that are not measured.")
@click.option(
    "--ready-check-timeout",
    "--ready-check-timeout-sec",
    "ready_check_timeout",
    type=click.FloatRange(min=0),
    default=0,
    show_default=True,
    help="Wait at most so many seconds until the server answers a request.",
)
@click.option("--health-probe", is_flag=True, help="Look at /health every 50 ms meanwhile.")
@selection_options
@click.option(
    "--also",
    callback=_others,
    multiple=True,
    metavar="NAME=URL",
    help="The same requests to this server too, in turns; repeatable.",
)
@click.option("--rounds", type=POSITIVE, default=1, show_default=True, help="Turns of each server.")
@click.option("--save-result", is_flag=True, help="Write results to a file in --result-dir.")
@click.option("--save-detailed", is_flag=True, help="With times and errors of every request.")
@click.option(
    "--result-dir", type=click.Path(file_okay=False, path_type=Path), default=Path(), help="[default: this folder]"
)
@click.option("--result-filename", metavar="NAME", help="[default: LABEL-RATEqps-MODEL-TIME.json]")
@output_json_option
def serve(
    target: Target,
    dataset_name: str,
    also: dict[str, str],
    save_result: bool,
    save_detailed: bool,
    result_dir: Path,
    result_filename: str | None,
    output_json: Path | None,
    **settings: Any,
) -> None:
    """Load on a server of the OpenAI API: latencies and tokens a second, with vLLM's flags and in its form.

    With --also the same requests go to several servers in turns, and a table compares them.
    """
    from shoal.bench.serve.measure import ServePlan, measure_serve
    from shoal.bench.store import write_json

    if target.name in also:
        raise click.UsageError(f"--also {target.name}=...: the first server has that name; --label gives it another.")
    plan = ServePlan(**settings)
    targets = [target, *(replace(target, name=name, base_url=url, model=None) for name, url in also.items())]
    models, results = measure_serve(plan, targets, lambda line: click.echo(line, err=True))
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    found = {"date": now, **_configuration(plan, targets, models), **_as_json(results, save_detailed)}
    if save_result:
        write_json(result_dir / (result_filename or _file_name(plan, target, models[target.name], now)), found)
    show(_text(plan, results), found, output_json)


def _configuration(plan: ServePlan, targets: Sequence[Target], models: Mapping[str, str]) -> dict[str, Any]:
    """vLLM's keys for it."""
    first = targets[0]
    return {
        "backend": first.backend,
        "label": first.name,
        "model_id": models[first.name],
        "base_urls": {target.name: target.base_url for target in targets},
        "num_prompts": plan.num_prompts,
        "request_rate": "inf" if math.isinf(plan.arrivals.rate) else plan.arrivals.rate,
        "burstiness": plan.arrivals.burstiness,
        "max_concurrency": plan.arrivals.max_concurrency,
    }


def _as_json(results: Results, detailed: bool) -> dict[str, Any]:
    """One run in vLLM's form; several by server and round, with their ratios."""
    from shoal.bench.serve.report import comparison

    by_server = {name: [one.as_json(detailed=detailed) for one in rounds] for name, rounds in results.items()}
    rounds = next(iter(by_server.values()))
    if len(by_server) == len(rounds) == 1:
        return rounds[0]
    return {"servers": by_server, "ratios": comparison(results)}


def _text(plan: ServePlan, results: Results) -> str:
    from shoal.bench.serve.report import comparison_table

    lines: dict[str, Any] = {}
    if plan.arrivals.max_concurrency is not None:
        lines["Maximum request concurrency:"] = plan.arrivals.max_concurrency
    if not math.isinf(plan.arrivals.rate):
        lines["Request rate configured (RPS):"] = plan.arrivals.rate
    if len(results) == 1:
        return "\n".join(one.table(lines) for rounds in results.values() for one in rounds)
    tables = [one.table({"Server:": name, **lines}) for name, rounds in results.items() for one in rounds]
    return "\n".join([*tables, "", comparison_table(results)])


def _file_name(plan: ServePlan, target: Target, model: str, now: str) -> str:
    """vLLM's."""
    most = plan.arrivals.max_concurrency
    concurrency = "" if most is None else f"-concurrency{most}"
    name = model.rpartition("/")[2]
    return f"{target.name}-{plan.arrivals.rate}qps{concurrency}-{name}-{now}.json"
