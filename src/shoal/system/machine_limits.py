"""What this process may use of the machine: cores and memory, as containers (cgroups v1 and v2) and ulimits narrow them.

The kernel enforces the limits of a process's own cgroup and of every cgroup above it, so the tightest counts. A file that is missing,
unreadable or nonsense sets no limit. ``root`` is where /proc and /sys are looked for: tests build trees of their own.
psutil is imported when memory is asked about: ``python -m shoal bench gpu`` does without it.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from shoal.errors import MemoryLimitError

ROOT = Path("/")

_NUMBER = re.compile(r"[0-9]{1,19}")
_UNLIMITED = 1 << 62  # v1 writes "no limit" as the largest number of whole pages
_RECLAIMABLE_V2 = frozenset({"inactive_file", "active_file", "slab_reclaimable"})  # of memory.stat
_RECLAIMABLE_V1 = frozenset({"total_inactive_file", "total_active_file"})
_OCTAL = re.compile(r"\\([0-7]{3})")

# Where cgroups are by convention, for containers whose mountinfo does not show them: controller ("" is v2) and folder.
_USUAL_PLACES = (
    ("", "/sys/fs/cgroup"),
    ("", "/sys/fs/cgroup/unified"),
    ("memory", "/sys/fs/cgroup/memory"),
    ("cpu", "/sys/fs/cgroup/cpu"),
    ("cpu", "/sys/fs/cgroup/cpu,cpuacct"),
)


@dataclass(frozen=True, slots=True)
class CpuQuota:
    """CPU time in seconds a second, and the file that sets it."""

    cpus: float
    source: str

    def __str__(self) -> str:
        return f"{self.cpus:g} ({self.source})"


@dataclass(frozen=True, slots=True)
class MemoryRoom:
    """``available`` bytes may be taken, of ``limit`` in all. ``source`` is what sets the limit: a file, an RLIMIT; "" for the
    machine's own memory."""

    available: int
    limit: int
    source: str = ""

    def require(self, what: str, needed: int) -> None:
        """Raise MemoryLimitError unless ``what`` has room for its bytes."""
        if needed > self.available:
            raise MemoryLimitError(f"{what} need {needed} bytes, {self}")

    def __str__(self) -> str:
        by = f" (the limit is {self.limit}, in {self.source})" if self.source else ""
        return f"{self.available} bytes of memory are available{by}"


def affinity() -> int:
    """Cores that this process may run on."""
    count = getattr(os, "process_cpu_count", None)  # from Python 3.13 on; hears PYTHON_CPU_COUNT
    try:
        return (count() if count else len(os.sched_getaffinity(0))) or 1
    except (AttributeError, OSError):  # not Linux, or forbidden
        return os.cpu_count() or 1


def usable_cores(root: Path = ROOT) -> int:
    """Threads that find a core each: ``affinity``, or the quota of CPU time in whole cores where that is less; at least 1.

    More threads than the quota would use it up early in each period, and then all of them stand still until the next.
    """
    quota = cpu_quota(root)
    return affinity() if quota is None else max(1, min(affinity(), int(quota.cpus)))


def cpu_quota(root: Path = ROOT) -> CpuQuota | None:
    """The tightest quota of CPU time; None if there is none."""
    quotas = [quota for group in _cgroups(root, "cpu") if (quota := _quota(group)) is not None]
    return min(quotas, key=lambda quota: quota.cpus, default=None)


def memory_room(root: Path = ROOT) -> MemoryRoom:
    """The memory that can be taken before something refuses it, or the kernel kills for it: the least room that any limit leaves."""
    import psutil

    machine = psutil.virtual_memory()
    cgroups = [room for group in _cgroups(root, "memory") if (room := _room(group)) is not None]
    return min(
        (MemoryRoom(machine.available, machine.total), *cgroups, *_rlimit_rooms()), key=lambda room: room.available
    )


def limits_in_force(root: Path = ROOT) -> dict[str, Any]:
    """What a report says of them, ready for JSON: sizes in bytes, ``cpu_quota`` in words or None."""
    quota, room = cpu_quota(root), memory_room(root)
    return {
        "affinity": affinity(),
        "cpu_quota": None if quota is None else str(quota),
        "threads": usable_cores(root),
        "memory_limit": room.limit,
        "memory_limit_set_by": room.source or "the machine",
        "memory_available": room.available,
    }


# cgroups --------------------------------------------------------------------------------------------------------------


class _Cgroup(NamedTuple):
    """The folder of a cgroup, under ``root``."""

    folder: Path
    unified: bool  # version 2
    root: Path

    @property
    def exists(self) -> bool:
        try:
            return self.folder.is_dir()
        except (OSError, ValueError):
            return False

    def text(self, name: str) -> str:
        return _read(self.folder / name)

    def number(self, name: str) -> int | None:
        return _number(self.text(name))

    def table(self, name: str) -> dict[str, int]:
        """A file of lines "KEY NUMBER"."""
        pairs = (line.split() for line in self.text(name).splitlines())
        numbers = ((pair[0], _number(pair[1])) for pair in pairs if len(pair) == 2)
        return {key: number for key, number in numbers if number is not None}

    def source(self, name: str) -> str:
        """The file as this process sees it, fit to be printed."""
        return f"/{(self.folder / name).relative_to(self.root)}".encode(errors="replace").decode()


class _Mount(NamedTuple):
    """A mounted hierarchy of cgroups: ``top`` is the cgroup that is seen at ``folder``; v2 has all controllers, written ""."""

    controller: str
    top: PurePosixPath
    folder: Path


def _cgroups(root: Path, controller: str) -> Iterable[_Cgroup]:
    """The cgroups whose limits on ``controller`` this process is under, in both versions, as far as they can be seen; each once."""
    return dict.fromkeys(group for group in _all_cgroups(root, controller) if group.exists)


def _all_cgroups(root: Path, controller: str) -> Iterator[_Cgroup]:
    own = _own_paths(_read(root / "proc/self/cgroup"))
    mounts = [*_mounts(root), *(_Mount(name, PurePosixPath("/"), _under(root, path)) for name, path in _USUAL_PLACES)]
    for mount in mounts:
        if mount.controller in ("", controller):
            for folder in _up(mount, own.get(mount.controller, PurePosixPath("/"))):
                yield _Cgroup(folder, not mount.controller, root)


def _up(mount: _Mount, path: PurePosixPath) -> Iterator[Path]:
    """The folders from the cgroup ``path`` up to the one that is mounted.

    A container is often told its path on the host, while what it sees mounted is its own cgroup: then only that one exists.
    """
    if ".." in path.parts:  # moved out of what this process can see
        path = PurePosixPath("/")
    if path.is_relative_to(mount.top):
        below = path.relative_to(mount.top)
        yield from (mount.folder / part for part in (below, *below.parents))


def _own_paths(text: str) -> dict[str, PurePosixPath]:
    """/proc/self/cgroup: the path of this process's cgroup for each controller, "" for v2."""
    fields = (line.split(":", 2) for line in text.splitlines())
    return {name: PurePosixPath("/", field[2]) for field in fields if len(field) == 3 for name in field[1].split(",")}


def _mounts(root: Path) -> Iterator[_Mount]:
    """The hierarchies in /proc/self/mountinfo."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        place, kind = left.split(" "), right.split(" ")
        if len(place) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        top, folder = PurePosixPath(_unescaped(place[3])), _under(root, _unescaped(place[4]))
        for controller in ("",) if kind[0] == "cgroup2" else kind[2].split(","):
            yield _Mount(controller, top, folder)


def _quota(group: _Cgroup) -> CpuQuota | None:
    if group.unified:
        name, (quota, period) = "cpu.max", _pair(group.text("cpu.max"))
    else:
        name, quota, period = "cpu.cfs_quota_us", group.number("cpu.cfs_quota_us"), group.number("cpu.cfs_period_us")
    if quota is None or not period:
        return None
    return CpuQuota(quota / period, group.source(name))


def _room(group: _Cgroup) -> MemoryRoom | None:
    """What is left of a cgroup's memory limit. What the kernel would take back before it kills counts as left."""
    stat = group.table("memory.stat")
    if group.unified:
        limits = {name: group.number(name) for name in ("memory.max", "memory.high")}
        used, reclaimable = group.number("memory.current"), _RECLAIMABLE_V2
    else:
        limits = {"memory.limit_in_bytes": group.number("memory.limit_in_bytes")}
        limits["memory.stat"] = stat.get("hierarchical_memory_limit")
        used, reclaimable = group.number("memory.usage_in_bytes"), _RECLAIMABLE_V1
    found = [(limit, name) for name, limit in limits.items() if limit is not None and limit < _UNLIMITED]
    if not found:
        return None
    limit, name = min(found)
    held = max(0, (used or 0) - sum(stat.get(key, 0) for key in reclaimable))
    return MemoryRoom(max(0, limit - held), limit, group.source(name))


# ulimits --------------------------------------------------------------------------------------------------------------


def _rlimit_rooms() -> Iterator[MemoryRoom]:
    """``ulimit -v`` and ``-d``: what this process has mapped counts, used or not."""
    mapped = _mapped()
    for name, used in {"RLIMIT_AS": mapped.get("vms", 0), "RLIMIT_DATA": mapped.get("data", 0)}.items():
        limit, _ = resource.getrlimit(getattr(resource, name))
        if limit != resource.RLIM_INFINITY:
            yield MemoryRoom(max(0, limit - used), limit, name)


def _mapped() -> Mapping[str, int]:
    import psutil

    try:
        memory: dict[str, int] = psutil.Process().memory_info()._asdict()
    except (OSError, psutil.Error):
        return {}
    return memory


# text -----------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    """Empty where there is nothing to read; ValueError is what a NUL in a path raises."""
    try:
        return os.fsdecode(path.read_bytes())
    except (OSError, ValueError):
        return ""


def _under(root: Path, path: str) -> Path:
    return root / path.lstrip("/")


def _unescaped(text: str) -> str:
    """mountinfo writes a space as \\040."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)


def _number(text: str) -> int | None:
    """None for "max", "-1" and nonsense."""
    word = text.strip()
    return int(word) if _NUMBER.fullmatch(word) else None


def _pair(text: str) -> tuple[int | None, int | None]:
    words = text.split()
    return (_number(words[0]), _number(words[1])) if len(words) == 2 else (None, None)
