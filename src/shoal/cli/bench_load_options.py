"""Flags of the verbs that put load on a server; the command gets each group of them as one object."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from shoal.cli.bench_options import POSITIVE
from shoal.cli.options import Command, json_object

if TYPE_CHECKING:
    from shoal.bench.serve.dataset import RandomShape, Sampling
    from shoal.bench.serve.load import Arrivals
    from shoal.bench.serve.measure import Target
    from shoal.bench.serve.report import Selection

NOT_NEGATIVE = click.IntRange(min=0)

Decorator = Callable[[Command], Command]


def group(name: str, build: Callable[..., Any], flags: Mapping[str, Mapping[str, Any]]) -> Decorator:
    """Add ``flags``, by the names of their parameters with what ``click.option`` takes; the command gets them as ``name``, built from
    their values."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def with_group(*args: Any, **kwargs: Any) -> Any:
            values = {flag: kwargs.pop(flag) for flag in flags}
            return command(*args, **{name: build(**values)}, **kwargs)

        decorated: Command = with_group
        for flag, settings in reversed(list(flags.items())):
            decorated = click.option(f"--{flag.replace('_', '-')}", **{"show_default": True, **settings})(decorated)
        return decorated

    return decorate


def target_options(command: Command) -> Command:
    """Where the server is, and what to ask it for; the command gets ``target``."""
    flags: dict[str, dict[str, Any]] = {
        "base_url": {"metavar": "URL", "help": "Address of the server, instead of --host and --port."},
        "host": {"default": "127.0.0.1"},
        "port": {"type": click.IntRange(1, 65535), "default": 8000},
        "backend": {
            "type": click.Choice(["openai", "openai-chat"]),
            "default": "openai",
            "help": "Completions of random token ids, or chats of random words.",
        },
        "endpoint": {"metavar": "PATH", "help": "Path of the API.  [default: the backend's]"},
        "model": {"metavar": "NAME", "help": "Model to ask for.  [default: the server's first]"},
        "api_key": {
            "envvar": "OPENAI_API_KEY",
            "show_default": False,
            "help": "Key, sent to every server.  [default: OPENAI_API_KEY]",
        },
        "label": {"metavar": "NAME", "help": "What to call the server.  [default: the backend]"},
    }
    return group("target", _target, flags)(command)


def _target(*, base_url: str | None, host: str, port: int, label: str | None, backend: str, **rest: Any) -> Target:
    from shoal.bench.serve.measure import Target

    shown = f"[{host}]" if ":" in host else host
    url = base_url or f"http://{shown}:{port}"
    return Target(name=label or backend, base_url=url, backend=backend, **rest)


def shape_options(*, input_len: int, output_len: int, range_ratio: float) -> Decorator:
    """How long prompts and answers are, with these defaults; the command gets ``shape``."""
    flags: dict[str, dict[str, Any]] = {
        "random_input_len": {"type": POSITIVE, "default": input_len, "help": "Tokens of a prompt."},
        "random_output_len": {"type": POSITIVE, "default": output_len, "help": "Tokens of an answer."},
        "random_range_ratio": {
            "type": float,
            "default": range_ratio,
            "help": "Both vary evenly by this share of them, up and down.",
        },
        "random_prefix_len": {
            "type": NOT_NEGATIVE,
            "default": 0,
            "help": "Tokens before them that all prompts have in common.",
        },
    }
    return group("shape", _shape, flags)


def _shape(**values: Any) -> RandomShape:
    from shoal.bench.serve.dataset import RandomShape

    return RandomShape(**{name.removeprefix("random_"): value for name, value in values.items()})


def sampling_options(command: Command) -> Command:
    """What bodies say beside the prompt; the command gets ``sampling``."""
    flags: dict[str, dict[str, Any]] = {
        "ignore_eos": {"is_flag": True, "show_default": False, "help": "Answers of full length."},
        "temperature": {"type": float, "help": "Of sampling.  [default: the server's]"},
        "extra_body": {
            "type": json_object,
            "metavar": "JSON",
            "default": "{}",
            "show_default": False,
            "help": "More fields of each body.",
        },
    }
    return group("sampling", _sampling, flags)(command)


def _sampling(extra_body: dict[str, Any], **rest: Any) -> Sampling:
    from shoal.bench.serve.dataset import Sampling

    return Sampling(extra=extra_body, **rest)


def arrival_options(command: Command) -> Command:
    """When requests are sent; the command gets ``arrivals``."""
    flags: dict[str, dict[str, Any]] = {
        "request_rate": {"type": float, "default": math.inf, "help": "Requests a second; inf: all at once."},
        "burstiness": {
            "type": float,
            "default": 1.0,
            "help": "1: a Poisson process; below: in bursts; above: evenly (a gamma distribution).",
        },
        "max_concurrency": {"type": POSITIVE, "help": "Requests under way at most; the others wait at the client."},
    }
    return group("arrivals", _arrivals, flags)(command)


def _arrivals(request_rate: float, **rest: Any) -> Arrivals:
    from shoal.bench.serve.load import Arrivals

    return Arrivals(rate=request_rate, **rest)


def selection_options(command: Command) -> Command:
    """What is reported; the command gets ``selection``."""
    flags: dict[str, dict[str, Any]] = {
        "percentile_metrics": {
            "type": _names,
            "metavar": "NAME,...",
            "default": "ttft,tpot,itl,e2el",
            "help": "Latencies to report.",
        },
        "metric_percentiles": {
            "type": _shares,
            "metavar": "N,...",
            "default": "99",
            "help": "Percentiles of each.",
        },
        "goodput": {
            "multiple": True,
            "metavar": "NAME:MS...",
            "help": "Count the requests within these limits of ttft, tpot, e2el: --goodput ttft:200 tpot:50.",
        },
    }
    return click.argument("more_goals", nargs=-1, metavar="")(
        group("selection", _selection, flags)(_with_goals(command))
    )


def _with_goals(command: Command) -> Command:
    """Take the values of ``--goodput`` after the first one, which click takes for arguments, as vLLM does."""

    @functools.wraps(command)
    def with_goals(
        *args: Any, selection: Callable[[Sequence[str]], Selection], more_goals: Sequence[str], **kwargs: Any
    ) -> Any:
        return command(*args, selection=selection(more_goals), **kwargs)

    return with_goals


def _selection(
    percentile_metrics: tuple[str, ...], metric_percentiles: tuple[float, ...], goodput: tuple[str, ...]
) -> Callable[[Sequence[str]], Selection]:
    from shoal.bench.serve.report import Selection

    def with_more(more_goals: Sequence[str]) -> Selection:
        if more_goals and not goodput:
            raise click.UsageError(f"Got unexpected extra argument ({more_goals[0]}).")
        goals = dict(_goal(pair) for pair in " ".join([*goodput, *more_goals]).split())
        return Selection(metrics=percentile_metrics, percentiles=metric_percentiles, goals=goals)

    return with_more


def _goal(pair: str) -> tuple[str, float]:
    name, _, limit = pair.partition(":")
    try:
        return name, float(limit)
    except ValueError:
        raise click.BadParameter(
            f"{pair!r} is not NAME:MILLISECONDS such as ttft:200.", param_hint="--goodput"
        ) from None


def _names(text: str) -> tuple[str, ...]:
    """A type of option: names with commas between them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _shares(text: str) -> tuple[float, ...]:
    """A type of option: percentages with commas between them."""
    try:
        return tuple(float(share) for share in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not percentages with commas between them.") from None
