"""``shoal serve``: the OpenAI-compatible server."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from shoal.cli.options import Command, integer, model_argument, server_engine_options
from shoal.params import EngineConfig

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)

# One row a flag: spelling, type, default, help. A default of () means that the flag may be repeated, False that it has no value.
_FLAGS: list[tuple[str, Any, Any, str]] = [
    ("--host", str, "127.0.0.1", "Address to listen on; 0.0.0.0 is all of them."),
    ("--port", integer, 8000, "0: any that is free."),
    ("--uds", str, None, "Path of a Unix socket to listen on instead."),
    ("--allowed-host", str, (), "Another name by which clients call this server; * is any."),
    ("--cors-origin", str, (), "Pages of this origin may ask.  [default: none]"),
    (
        "--api-key",
        str,
        (),
        "Clients must give one of the keys. Others can see arguments: rather use SHOAL_API_KEY or a file.",
    ),
    ("--api-key-file", _FILE, None, "Keys, one a line."),
    (
        "--served-model-name",
        str,
        (),
        "What requests may call the model.  [default: MODEL, its file's name and general.name]",
    ),
    ("--max-waiting", integer, 1024, "Requests that may wait while others run; more get 429."),
    ("--max-waiting-tokens", integer, 4_000_000, "Tokens of prompts that may wait."),
    ("--request-timeout", float, None, "Most seconds for a request.  [default: no limit]"),
    ("--queue-timeout", float, None, "Most seconds for a request to wait.  [default: no limit]"),
    ("--isolate-prefix-cache", bool, False, "Keep the prompts of each API key from speeding up those of others."),
    ("--keep-alive", float, 15.0, "Seconds after which an idle stream gets a comment."),
    ("--stall-timeout", float, 30.0, "Seconds after which a stream whose client reads nothing is given up."),
    ("--drain-timeout", float, 30.0, "Seconds for requests under way after SIGTERM."),
    ("--data-dir", _FOLDER, None, "Where uploads and batches are kept.  [default: in the user's data folder, by port]"),
    ("--max-body-size", str, "2MiB", "Largest request, but for uploads."),
    ("--max-file-size", str, "1GiB", "Largest upload."),
    ("--access-log", bool, False, "A line of JSON on stderr for each request."),
    ("--log-prompts", bool, False, "The same, with the texts of prompts and answers in it."),
]


def _server_options(command: Command) -> Command:
    return functools.reduce(lambda decorated, row: _option(*row)(decorated), reversed(_FLAGS), command)


def _option(flag: str, kind: Any, default: Any, text: str) -> Callable[[Command], Command]:
    if kind is bool:
        return click.option(flag, is_flag=True, help=text)
    shown = default not in (None, ())
    return click.option(flag, type=kind, multiple=default == (), default=default, show_default=shown, help=text)


@click.command()
@model_argument()
@_server_options
@server_engine_options
def serve(model: str, engine_config: EngineConfig, **flags: Any) -> int:
    """Serve MODEL behind OpenAI's API (and Anthropic's), with a page at /.

    Requests are batched as they come. SIGTERM or Ctrl-C lets those under way finish; a second one ends at once.
    """
    from shoal.server.launch import launch

    return launch(model, engine_config, flags)
