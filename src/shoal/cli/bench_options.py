"""What the verbs of ``shoal bench`` share: flags, types of flags, and how results are shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from shoal.cli.results import write_result

POSITIVE = click.IntRange(min=1)

disable_detokenize_option = click.option("--disable-detokenize", is_flag=True, help="Leave the tokenizer out.")
output_json_option = click.option(
    "--output-json", type=click.Path(dir_okay=False, path_type=Path), help="Write results here."
)
peer_python_option = click.option(
    "--peer-python",
    metavar="PYTHON",
    default=sys.executable,
    help="Interpreter that has llama-cpp-python.  [default: this one]",
)


def numbers(low: int, high: int, *, at_least: int = 1) -> Callable[[str], tuple[int, ...]]:
    """A type of option: at least so many whole numbers from ``low`` to ``high`` with commas between them."""

    def convert(text: str) -> tuple[int, ...]:
        items = [item.strip() for item in text.split(",") if item.strip()]
        good = all(item.isdecimal() and low <= int(item) <= high for item in items)
        if not good or len(items) < at_least:
            raise click.BadParameter(f"{text!r} is not numbers from {low} to {high} with commas between them.")
        return tuple(map(int, items))

    return convert


def show(text: str, results: dict[str, Any], output_json: Path | None) -> None:
    """The results in a file if one is wanted, and the text on stdout, which may be gone by now."""
    if output_json is not None:
        output_json.write_text(json.dumps(results, indent=4) + "\n", encoding="utf-8")
    write_result(text)
