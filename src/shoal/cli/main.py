"""The ``shoal`` command: finds the verb, turns errors into one line and an exit code.

Exit codes: 0 done · 1 the job finished with failed rows, or a soak failed · 2 bad input or usage, or nowhere to write the result ·
130 interrupted.
A verb is imported when it is asked for; it returns None or its exit code. stdout carries results only.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import click

from shoal.cli.results import write_result
from shoal.errors import ShoalError
from shoal.system.streams import say, streams_of_a_program
from shoal.version import __version__

BAD_INPUT = 2
INTERRUPTED = 130

VERBS = {
    "pull": "shoal.cli.pull:pull",
    "inspect": "shoal.cli.inspect:inspect",
    "complete": "shoal.cli.complete:complete",
    "chat": "shoal.cli.chat:chat",
    "tokenize": "shoal.cli.tokenize:tokenize",
    "perplexity": "shoal.cli.perplexity:perplexity",
    "run-batch": "shoal.cli.run_batch:run_batch",
    "serve": "shoal.cli.serve:serve",
    "job": "shoal.cli.job:job",
    "bench": "shoal.cli.bench:bench",
    "list": "shoal.cli.models:list_",
    "rm": "shoal.cli.models:rm",
    "collect-env": "shoal.cli.collect_env:collect_env",
}


@dataclass(slots=True)
class Settings:
    """What holds for the whole run, whichever verb it is."""

    debug: bool = False


class VerbGroup(click.Group):
    """A group whose verbs are imported from ``VERBS`` when they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the verbs, in the order of the table."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb, imported now; None if there is no such verb."""
        target = VERBS.get(cmd_name)
        if target is None:
            return None
        module, _, attribute = target.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        _accept_debug(command)
        return command


def _set_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    settings = ctx.find_object(Settings)
    if value and settings is not None:
        settings.debug = True


_debug_option = click.Option(
    ["--debug"], is_flag=True, expose_value=False, is_eager=True, callback=_set_debug, help="Show tracebacks of errors."
)


def _accept_debug(command: click.Command) -> None:
    """Let ``--debug`` stand after the verb too, and after the verbs of a verb."""
    if _debug_option not in command.params:
        command.params.append(_debug_option)
    for inner in command.commands.values() if isinstance(command, click.Group) else ():
        _accept_debug(inner)


@click.group(
    cls=VerbGroup,
    invoke_without_command=True,
    params=[_debug_option],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.version_option(__version__, prog_name="shoal")
@click.pass_context
def shoal(ctx: click.Context) -> None:
    """Run many language-model requests at once, directly on quantised GGUF files."""
    if ctx.invoked_subcommand is None:
        write_result(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (default: the process's own) and return the exit code."""
    with streams_of_a_program():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    settings = Settings()
    try:
        result = shoal.main(arguments, prog_name="shoal", standalone_mode=False, obj=settings)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return BAD_INPUT
    except click.ClickException as error:
        return _fail(error, _usage_message(error), settings)
    except (ShoalError, OSError) as error:
        return _fail(error, str(error), settings)
    except (KeyboardInterrupt, click.Abort) as error:
        if isinstance(error.__cause__, EOFError):  # click takes any for a user's Ctrl-D
            raise error.__cause__ from None
        say("interrupted")
        return INTERRUPTED
    except SystemExit as error:  # click's answer to a stdout that nobody reads any more
        return _fail(error, "stdout: Broken pipe", settings)
    return result if isinstance(result, int) else 0


def _usage_message(error: click.ClickException) -> str:
    message = error.format_message()
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f"{message} See '{context.command_path} --help'." if context else message


def _fail(error: BaseException, message: str, settings: Settings) -> int:
    if settings.debug:
        traceback.print_exception(error)
    say(" ".join(message.split()))
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
