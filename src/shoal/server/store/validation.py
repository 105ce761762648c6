"""Whether a file is a batch file: every line a row for the endpoint, with a name of its own. What is wrong in a body is that row's own
failure, later."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shoal.errors import JobError
from shoal.jobs.input.ids import IdIndex
from shoal.jobs.input.rows import MAX_CUSTOM_ID, Line, custom_id_of
from shoal.jobs.input.source import open_source
from shoal.openai.schema import APIError, parse_json
from shoal.server.store.batches import BatchError

MOST_ERRORS = 100  # as many are told
_NEEDED = ("custom_id", "method", "url", "body")


def check_rows(path: Path, endpoint: str, scratch: Path) -> tuple[int, list[BatchError]]:
    """How many rows ``path`` has, and what is wrong with it, at most MOST_ERRORS errors. ``scratch``: a file for the index of names.

    Raises OSError, and JobError caused by sqlite3.Error, where the disk fails.
    """
    rows, errors = 0, list[BatchError]()
    try:
        with open_source(path) as lines, IdIndex(scratch) as index:
            for line in lines:
                rows += 1
                errors += _errors(line, endpoint, index)
                if len(errors) >= MOST_ERRORS:
                    return rows, errors[:MOST_ERRORS]
    except JobError as error:
        if error.__cause__ is not None:
            raise
        code = "invalid_file" if path.stat().st_size else "empty_file"
        return 0, [BatchError(code=code, message=str(error).removeprefix(f"{path}: "))]
    if not rows:
        errors.append(BatchError(code="empty_file", message="the file has no rows: there is nothing to run"))
    return rows, errors


def _errors(line: Line, endpoint: str, index: IdIndex) -> Iterator[BatchError]:
    """What is wrong with a line: the first thing."""
    try:
        fields = parse_json(line.data) if line.data is not None else line.error
    except APIError as error:
        yield BatchError(code="invalid_json_line", message=str(error), line=line.number)
        return
    if not isinstance(fields, dict):
        what = fields if line.data is None else f"must be a JSON object with {', '.join(_NEEDED)}"
        yield BatchError(code="invalid_json_line", message=str(what), line=line.number)
        return
    missing = next((name for name in _NEEDED if fields.get(name) in (None, "")), None)
    if missing is not None:
        yield _error("missing_required_parameter", line, missing, "is missing")
    elif fields["method"] != "POST":
        yield _error("invalid_method", line, "method", f"is {_shown(fields['method'])}, must be 'POST'")
    elif fields["url"] != endpoint:
        yield _error(
            "invalid_url", line, "url", f"is {_shown(fields['url'])}, must be the batch's endpoint {endpoint!r}"
        )
    else:
        yield from _name_errors(line, index)


def _name_errors(line: Line, index: IdIndex) -> Iterator[BatchError]:
    name = custom_id_of(line)
    if name is None:
        yield _error("invalid_custom_id", line, "custom_id", f"must be a text of 1 to {MAX_CUSTOM_ID} characters")
        return
    earlier = index.add(name, line.number)
    if earlier is not None:
        yield _error("duplicate_custom_id", line, "custom_id", f"{_shown(name)} is in line {earlier} too")


def _error(code: str, line: Line, param: str, what: str) -> BatchError:
    return BatchError(code=code, message=f"{param} {what}", param=param, line=line.number)


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
