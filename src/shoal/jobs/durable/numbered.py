"""The journal of a job as numbered objects: the same records as in a journal file, in objects each of which is created only once.

``_shoal/journal/000000000001`` and so on hold a header and records:

    {"version": 1, "number": 3, "driver": "...", "records": 8, "parts": [...], "claim": null}\n
    | crc | record | record | ...

with records as in ``journal``, crcs included; the crc of the header continues that of the object before, or begins at 0 in a claim that
is ``fresh``. A *driver* is a process that works on the job. It begins with a claim, an object with the next number: a driver from
before finds the number of its next object taken by that claim, and so learns that it has lost the job. A fresh claim begins the
job anew: nothing before it counts. No object is ever deleted, so that this holds however late a driver comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from zlib import crc32

import msgspec

from shoal.errors import JobError
from shoal.jobs.durable.journal import RECORD_SIZE, Entry, Record, Redo, State, damaged, seal, unseal
from shoal.jobs.durable.store import AlreadyThereError, Store

VERSION = 1
JOURNAL = "_shoal/journal"

_CRC_BYTES = 4
_READ_AT_ONCE = 32


class TakenOverError(JobError):
    """Another process works on the job now; what this one had not committed yet is void."""


class Claim(msgspec.Struct, frozen=True):
    """How a driver begins. ``fresh``: the job begins with it. ``job``: what job it is, a digest. ``time``: Unix time of its clock."""

    fresh: bool
    job: str
    host: str
    pid: int
    time: float


class Part(msgspec.Struct, frozen=True):
    """A part of the output: ``name`` when it is published, ``staged`` before; ``rows`` lines, ``bytes``, and the CRC-32 of them."""

    name: str
    staged: str
    rows: int
    bytes: int
    crc32: int


class Header(msgspec.Struct, frozen=True):
    """What an object of the journal says of itself; ``driver`` is another text for each process. ``claim`` is None in a commit."""

    version: int
    number: int
    driver: str
    records: int
    parts: list[Part]
    claim: Claim | None = None


def object_name(number: int) -> str:
    """The name of the object with a ``number``, from 1."""
    return f"{JOURNAL}/{number:012}"


def number_in(name: str) -> int | None:
    """The number at the end, or before a ``-`` at the beginning, of a name in the folder; None if it has none."""
    text = name.rpartition("/")[2].removeprefix("part-").partition("-")[0].partition(".")[0]
    return int(text) if len(text) == 12 and text.isdigit() else None


class Replay:
    """What the objects of a journal say, one after the other. ``parts`` are the valid ones by their names.

    ``number`` and ``crc`` are of the last object, 0 and 0 before the first. ``job`` is that of the last claim, "" before it.
    """

    def __init__(self, place: str) -> None:
        self.number = self.crc = 0
        self.job = ""
        self.state = State(errors_apart=True)
        self.parts: dict[str, Part] = {}
        self._place = place
        self._problem: JobError | None = None

    def check(self) -> None:
        """Raises JobError for a journal that is damaged, or incomplete."""
        if self._problem is not None:
            raise self._problem

    def skip_to(self, number: int) -> None:
        """What follows is ``number``. None may be missing, unless a fresh claim follows."""
        if number != self.number + 1:
            self._find(f"there is no object {object_name(self.number + 1)}")
        self.number = number - 1

    def take(self, data: bytes) -> None:
        """Take in the next object."""
        self.number += 1
        place = f"{self._place}/{object_name(self.number)}"
        try:
            header, records, crc = _decode(data, self.number, self.crc, place)
        except JobError as error:
            self._problem = self._problem or error
            return
        if header.claim is not None:
            self._claimed(header.claim)
        if self._problem is None:
            self.crc = crc
            self.apply(records, header.parts)

    def apply(self, records: Sequence[Record], parts: Sequence[Part]) -> None:
        """Take in what a commit says."""
        for record in records:
            if not self.state.admits(record):
                self._find(f"a record in {object_name(self.number)} contradicts those before it")
                return
            self.state.apply(record)
        if any(isinstance(record, Redo) for record in records):
            self.parts = {name: part for name, part in self.parts.items() if not name.startswith("errors/")}
        self.parts |= {part.name: part for part in parts}
        if sum(part.bytes for part in parts) != sum(entry.length for entry in records if isinstance(entry, Entry)):
            self._find(f"the parts of {object_name(self.number)} are not those of its records")

    def _claimed(self, claim: Claim) -> None:
        if claim.fresh:
            self.state, self.parts = State(errors_apart=True), {}
            self._problem = None
        self.job = claim.job

    def _find(self, reason: str) -> None:
        self._problem = self._problem or damaged(self._place, reason)


def read(store: Store) -> Replay:
    """What the whole journal says. In constant memory, but for a bit or two a row and what is said of each part. Raises OSError."""
    replay = Replay(store.place)
    for number, data in _objects(store):
        replay.skip_to(number)
        replay.take(data)
    return replay


def header_at(store: Store, number: int) -> Header | None:
    """What the object with a ``number`` says of itself; None if there is no such object, or it cannot be read."""
    with suppress(FileNotFoundError, msgspec.MsgspecError, ValueError):
        return msgspec.json.decode(store.read(object_name(number)).partition(b"\n")[0], type=Header)
    return None


def create(store: Store, header: Header, records: Sequence[Record], crc: int) -> int:
    """Create an object that follows one with ``crc``; returns its own.

    Raises AlreadyThereError where another has its number.
    """
    data, crc = _encode(header, records, crc)
    store.create(object_name(header.number), data)
    return crc


def claim(store: Store, replay: Replay, driver: str, claim: Claim) -> None:
    """Take the job over, as the next object after those in ``replay``, which is brought up to date.

    Raises TakenOverError if the claim is fresh and another process has begun something here, or gone on with it, since ``replay``; and
    if that process works on another job.
    """
    while True:
        header = Header(VERSION, replay.number + 1, driver, 0, [], claim)
        data, _ = _encode(header, [], 0 if claim.fresh else replay.crc)
        try:
            store.create(object_name(header.number), data)
        except AlreadyThereError:  # another is at work, or was until a moment ago
            replay.take(store.read(object_name(header.number)))
            if claim.fresh or replay.job != claim.job:
                raise TakenOverError(
                    f"{store.place}: another process began a job here at the same time; this one ends"
                ) from None
        else:
            replay.take(data)
            return


def numbers(store: Store) -> list[int]:
    """Those of all objects, in order."""
    return sorted(number for name in store.list(JOURNAL) if (number := number_in(name)) is not None)


def _objects(store: Store) -> Iterator[tuple[int, bytes]]:
    """All objects in their order, some read at once where each of them takes a while to come."""
    with ThreadPoolExecutor(1 if store.is_local else _READ_AT_ONCE) as pool:
        for batch in _batched(numbers(store), _READ_AT_ONCE):
            yield from zip(batch, pool.map(lambda number: store.read(object_name(number)), batch), strict=True)


def _batched(numbers: list[int], size: int) -> Iterator[list[int]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def _encode(header: Header, records: Sequence[Record], crc: int) -> tuple[bytes, int]:
    line = msgspec.json.encode(header) + b"\n"
    crc = crc32(line, crc)
    pieces = [line, crc.to_bytes(_CRC_BYTES, "little")]
    for record in records:
        data, crc = seal(record, crc)
        pieces.append(data)
    return b"".join(pieces), crc


def _decode(data: bytes, number: int, crc: int, place: str) -> tuple[Header, list[Record], int]:
    """Header, records and crc of an object that follows one with ``crc``."""
    line, _, rest = data.partition(b"\n")
    try:
        version = msgspec.json.decode(line, type=_Versioned).version
        header = msgspec.json.decode(line, type=Header) if version == VERSION else None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise damaged(place, f"it does not begin like an object of a journal ({error})") from None
    if header is None:
        raise damaged(place, f"its format has version {version}, this shoal reads version {VERSION}")
    crc = crc32(line + b"\n", 0 if header.claim and header.claim.fresh else crc)
    if header.number != number or rest[:_CRC_BYTES] != crc.to_bytes(_CRC_BYTES, "little"):
        raise damaged(place, "the CRC of its header is wrong")
    records: list[Record] = []
    for start in range(_CRC_BYTES, len(rest), RECORD_SIZE):
        found = unseal(rest[start : start + RECORD_SIZE], crc, place)
        if found is None:
            break
        records.append(found[0])
        crc = found[1]
    if len(rest) != _CRC_BYTES + header.records * RECORD_SIZE or len(records) != header.records:
        raise damaged(place, "the CRC of one of its records is wrong, or some are missing")
    return header, records, crc


class _Versioned(msgspec.Struct):
    """What every version of a header has."""

    version: int
