"""``shoal tokenize``: text to token ids, and back."""

from __future__ import annotations

import json
from pathlib import Path

import click

from shoal.cli.options import model_option
from shoal.cli.results import write_result
from shoal.cli.sampling import read_text, text_options
from shoal.errors import RequestError


@click.command()
@click.argument("text", required=False)
@model_option()
@click.option("-f", "--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Read the text here.")
@click.option("--decode", is_flag=True, help="The text is token ids (separated by space or comma): print their text.")
@click.option("--pieces", is_flag=True, help="One token a line: id, and its text in Python's notation.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@text_options
def tokenize(
    text: str | None,
    model: str,
    file: Path | None,
    decode: bool,
    pieces: bool,
    as_json: bool,
    add_special: bool,
    parse_special: bool,
) -> None:
    """Print the token ids of TEXT, of a file or of stdin, on one line. Vocabulary-only files will do."""
    from shoal import hub
    from shoal.text.tokenizer import Tokenizer

    if text is not None and file is not None:
        raise click.UsageError("give TEXT or --file, not both.")
    given = read_text(file) if text is None else text
    tokenizer = Tokenizer.from_gguf(hub.resolve(model))
    ids = _parsed_ids(given) if decode else tokenizer.encode(given, add_special, parse_special)
    shown = [_shown(tokenizer.token_bytes(token)) for token in ids] if pieces else []
    if as_json:
        result = {"text": tokenizer.decode(ids) if decode else given, "ids": ids, "count": len(ids)}
        write_result(json.dumps({**result, "pieces": shown} if pieces else result))
    elif pieces:
        for token, piece in zip(ids, shown, strict=True):
            write_result(f"{token}\t{piece!r}")
    elif decode:
        write_result(tokenizer.decode(ids))
    else:
        write_result(" ".join(map(str, ids)))


def _shown(piece: bytes) -> str:
    """A token's text; bytes that are not whole characters as \\x escapes."""
    return piece.decode("utf-8", "backslashreplace")


def _parsed_ids(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    for word in words:
        if not (word.isascii() and word.isdigit()) or len(word) > 10:
            raise RequestError(f"token ids: got {word[:40]!r}, must be whole numbers")
    return list(map(int, words))
