"""``shoal bench soak``: does a server under load and disconnects hold on to anything?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shoal.cli.bench_load_options import NOT_NEGATIVE, shape_options, target_options
from shoal.cli.bench_options import POSITIVE, output_json_option, show

if TYPE_CHECKING:
    from shoal.bench.serve.measure import Target

FAILED = 1

_ABOVE_0 = click.FloatRange(min=0, min_open=True)


@click.command()
@target_options
@click.option("--pid", type=POSITIVE, required=True, help="Process of the server.")
@click.option("--minutes", type=_ABOVE_0, default=10, show_default=True, help="Of load, after warming up.")
@click.option("--warmup-minutes", type=_ABOVE_0, default=2, show_default=True, help="Of load before that.")
@click.option("--concurrency", type=POSITIVE, default=64, show_default=True, help="Requests at once.")
@click.option(
    "--cut-share",
    type=click.FloatRange(0, 1),
    default=0.3,
    show_default=True,
    help="Share of requests that are given up at a random moment.",
)
@click.option("--interval", type=_ABOVE_0, default=5, show_default=True, help="Seconds between looks at the process.")
@click.option(
    "--pause", type=_ABOVE_0, default=5, show_default=True, help="Seconds of quiet before handles and threads count."
)
@shape_options(input_len=64, output_len=64, range_ratio=0.9)
@click.option("--vocab-size", type=POSITIVE, help="Token ids are below it.  [default: as the server says]")
@click.option("--seed", type=NOT_NEGATIVE, default=0, show_default=True, help="Chooses the requests.")
@output_json_option
def soak(target: Target, minutes: float, warmup_minutes: float, output_json: Path | None, **settings: Any) -> int:
    """As much load as a server takes, with readers that go away: memory, open files and threads of its process.

    Half of the requests are streamed. Exit code 1 where memory grew by more than 1 % after warming up, files or threads are left
    over, or requests failed other than by 429 and 503.
    """
    from shoal.bench.serve.soak import SoakPlan, measure_soak

    plan = SoakPlan(seconds=60 * minutes, warmup=60 * warmup_minutes, **settings)
    result = measure_soak(plan, target, lambda line: click.echo(line, err=True))
    show(result.as_markdown(), result.as_json(), output_json)
    return 0 if result.held else FAILED
