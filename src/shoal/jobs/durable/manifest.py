"""A job's manifest: what the job is, so that only the same job goes on with its files, and how far it came."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from shoal.errors import JobError
from shoal.jobs.durable.file_systems import sync_folder
from shoal.jobs.durable.storage import write_atomically

VERSION = 1

State = Literal["running", "interrupted", "finished", "cancelled", "expired", "stopped"]

NAME = "manifest.json"
_MOVABLE = "input.path"  # what may differ: the input has only moved
_MOST_SHOWN = 80
_LATEST = 1e11  # a time that every calendar still has
_ABSENT = object()


class Identity(msgspec.Struct, frozen=True):
    """All that a job's results depend on: of two jobs with equal identities, one may go on with the files of the other."""

    input: dict[str, Any]  # file_fingerprint; empty for stdin
    model: dict[str, Any]  # model_fingerprint
    parameters: dict[str, Any]  # defaults of the rows, the seed, how rows are read
    numerics: dict[str, Any]  # backend and number formats
    shoal: str  # version


class Manifest(msgspec.Struct, kw_only=True):
    """One job. Times in seconds since 1970; ``rows`` is None where they have not been counted; ``ends``: the number of the last row of
    each of several files. The time to a deadline counts from ``since``: the beginning, or when failed rows were last put back.
    ``utc_offset``: what the clock on the wall showed more than UTC when the job was begun, in seconds; None where that was not written
    down."""

    version: int = VERSION
    identity: Identity
    created: Annotated[float, msgspec.Meta(ge=0, le=_LATEST)]
    utc_offset: Annotated[float, msgspec.Meta(gt=-86400, lt=86400)] | None = None
    since: float
    output: str
    errors: str
    rows: int | None = None
    ends: list[int] | None = None
    deadline: float | None = None
    runs: int = 0
    state: State = "running"
    summary: dict[str, Any] | None = None

    @property
    def begun(self) -> datetime:
        """When the job was begun, by the clock on the wall there."""
        moment = datetime.fromtimestamp(self.created, UTC)
        zone = None if self.utc_offset is None else timezone(timedelta(seconds=self.utc_offset))
        return moment.astimezone(zone)


class ChangedError(JobError):
    """A job is to go on as something else than it was; ``changes`` says what differs."""

    def __init__(self, output: object, changes: list[str]) -> None:
        super().__init__(f"{output} belongs to another job: {'; '.join(changes)} (--restart begins anew)")
        self.output, self.changes = output, changes

    def __reduce__(self) -> tuple[type[ChangedError], tuple[object, list[str]]]:
        return (type(self), (self.output, self.changes))


class _Versioned(msgspec.Struct):
    """What every version of a manifest has."""

    version: int


def load(folder: Path) -> Manifest | None:
    """The manifest in a journal folder; None if there is none. Raises JobError for one that this version cannot read."""
    path = folder / NAME
    try:
        return decode(path, path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from error


def save(folder: Path, manifest: Manifest) -> None:
    """Put a manifest into a journal folder, in one step in place of the one before. Raises OSError."""
    write_atomically(folder / NAME, encode(manifest))


def drop(folder: Path) -> None:
    """Take the manifest out of a journal folder, durably, if there is one. Raises OSError."""
    (folder / NAME).unlink(missing_ok=True)
    sync_folder(folder)


def encode(manifest: Manifest) -> bytes:
    """As it is written down."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def decode(place: object, data: bytes) -> Manifest:
    """What was written down at ``place``. Raises JobError for what this version cannot read."""
    try:
        version = msgspec.json.decode(data, type=_Versioned).version
        if version != VERSION:
            raise JobError(f"{place}: version {version}, this shoal reads {VERSION}; --restart begins the job anew")
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _unreadable(place, error) from error


def digest(identity: Identity) -> str:
    """Equal for identities without differences: hex of 16 bytes."""
    leaves = sorted((name, value) for name, value in _flat("", _as_json(identity)).items() if name != _MOVABLE)
    return blake2b(msgspec.json.encode(leaves), digest_size=16).hexdigest()


def differences(old: Identity, new: Identity) -> list[str]:
    """What differs, a line each: ``model.blake2b: was "1f..", is "c0.."``. An input that has only moved is the same."""
    before, after = _flat("", _as_json(old)), _flat("", _as_json(new))
    names = [name for name in before | after if name != _MOVABLE]
    pairs = [(name, before.get(name, _ABSENT), after.get(name, _ABSENT)) for name in names]
    return [f"{name}: was {_shown(was)}, is {_shown(now)}" for name, was, now in pairs if was != now]


def _unreadable(place: object, error: Exception) -> JobError:
    return JobError(f"{place}: not the manifest of a job ({error}); --restart begins the job anew")


def _as_json(identity: Identity) -> Any:
    """As it comes back from a file: tuples are lists, keys are texts."""
    return msgspec.json.decode(msgspec.json.encode(identity))


def _flat(name: str, value: Any) -> dict[str, Any]:
    """The leaves of nested objects by their dotted names."""
    if not isinstance(value, dict):
        return {name: value}
    leaves: dict[str, Any] = {}
    for key, item in value.items():
        leaves |= _flat(f"{name}.{key}" if name else key, item)
    return leaves


def _shown(value: object) -> str:
    if value is _ABSENT:
        return "absent"
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."
