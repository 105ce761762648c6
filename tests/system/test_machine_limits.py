"""Limits of containers, read from trees of files as the kernel shows them in each kind of container."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import MemoryLimitError
from shoal.system import machine_limits
from shoal.system.machine_limits import CpuQuota, MemoryRoom, cpu_quota, limits_in_force, memory_room, usable_cores

MIB = 1 << 20
MACHINE = MemoryRoom(64 << 30, 128 << 30)
UNLIMITED_V1 = "9223372036854771712\n"

# Where the hierarchies usually are.
PLACES = {"v2": "sys/fs/cgroup", "memory": "sys/fs/cgroup/memory", "cpu": "sys/fs/cgroup/cpu,cpuacct"}

V2_MOUNT = "31 23 0:28 {top} {folder} rw,nosuid shared:4 master:2 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "32 23 0:29 {top} {folder} rw,relatime - cgroup cgroup rw,{controllers}\n"


@pytest.fixture(autouse=True)
def big_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 GiB of 128 GiB are free, 16 cores may be used, and no ulimit is set."""
    memory = SimpleNamespace(available=MACHINE.available, total=MACHINE.limit)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    monkeypatch.setattr(machine_limits, "affinity", lambda: 16)
    monkeypatch.setattr(resource, "getrlimit", lambda name: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def tree(root: Path, files: Mapping[str, str | bytes]) -> Path:
    """A root with these files; in the names {v2}, {memory} and {cpu} stand for PLACES."""
    for name, text in files.items():
        path = root / name.format(**PLACES)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def v2_mount(top: str = "/", folder: str = "/sys/fs/cgroup") -> str:
    return V2_MOUNT.format(top=top, folder=folder)


def v1_mounts(top: str = "/") -> str:
    return V1_MOUNT.format(top=top, folder="/sys/fs/cgroup/memory", controllers="memory") + V1_MOUNT.format(
        top=top, folder="/sys/fs/cgroup/cpu,cpuacct", controllers="cpu,cpuacct"
    )


def test_no_cgroups_set_no_limit(tmp_path: Path) -> None:
    assert memory_room(tmp_path) == MACHINE
    assert cpu_quota(tmp_path) is None
    assert usable_cores(tmp_path) == 16


# -- version 2 ---------------------------------------------------------------------------------------------------------

CONTAINER_V2 = {
    "proc/self/cgroup": "0::/\n",
    "proc/self/mountinfo": v2_mount(),
    "{v2}/memory.max": f"{512 * MIB}\n",
    "{v2}/memory.current": f"{50 * MIB}\n",
    "{v2}/memory.stat": f"anon {40 * MIB}\ninactive_file {6 * MIB}\nactive_file {3 * MIB}\nslab_reclaimable {MIB}\n",
    "{v2}/cpu.max": "350000 100000\n",
}


def test_a_container_with_a_namespace_of_its_own(tmp_path: Path) -> None:
    root = tree(tmp_path, CONTAINER_V2)
    assert memory_room(root) == MemoryRoom(472 * MIB, 512 * MIB, "/sys/fs/cgroup/memory.max")
    assert cpu_quota(root) == CpuQuota(3.5, "/sys/fs/cgroup/cpu.max")
    assert usable_cores(root) == 3


@pytest.mark.parametrize(("quota", "threads"), [("50000 100000", 1), ("199999 100000", 1), ("9000000 100000", 16)])
def test_threads_are_whole_cores_of_the_quota_at_least_one_and_no_more_than_may_be_used(
    tmp_path: Path, quota: str, threads: int
) -> None:
    assert usable_cores(tree(tmp_path, {**CONTAINER_V2, "{v2}/cpu.max": quota})) == threads


def test_max_is_no_limit_and_high_is_one(tmp_path: Path) -> None:
    files = {**CONTAINER_V2, "{v2}/memory.max": "max\n", "{v2}/cpu.max": "max 100000\n"}
    root = tree(tmp_path, files)
    assert (memory_room(root), cpu_quota(root)) == (MACHINE, None)
    tree(root, {"{v2}/memory.high": f"{100 * MIB}\n"})
    assert memory_room(root) == MemoryRoom(60 * MIB, 100 * MIB, "/sys/fs/cgroup/memory.high")


def test_the_tightest_of_nested_cgroups_counts(tmp_path: Path) -> None:
    """systemd: a slice above the scope has less memory left, the one above that less CPU time."""
    files = {
        "proc/self/cgroup": "0::/user.slice/user-1000.slice/run-7.scope\n",
        "proc/self/mountinfo": v2_mount(),
        "{v2}/user.slice/cpu.max": "200000 100000",
        "{v2}/user.slice/user-1000.slice/memory.max": str(1024 * MIB),
        "{v2}/user.slice/user-1000.slice/memory.current": str(1000 * MIB),
        "{v2}/user.slice/user-1000.slice/cpu.max": "max 100000",
        "{v2}/user.slice/user-1000.slice/run-7.scope/memory.max": str(256 * MIB),
        "{v2}/user.slice/user-1000.slice/run-7.scope/memory.current": str(10 * MIB),
        "{v2}/user.slice/user-1000.slice/run-7.scope/cpu.max": "400000 100000",
        "{v2}/user.slice/user-1001.slice/memory.max": "1",
    }
    root = tree(tmp_path, files)
    slice_ = "/sys/fs/cgroup/user.slice"
    assert memory_room(root) == MemoryRoom(24 * MIB, 1024 * MIB, f"{slice_}/user-1000.slice/memory.max")
    assert cpu_quota(root) == CpuQuota(2.0, f"{slice_}/cpu.max")


@pytest.mark.parametrize("top", ["/system.slice/docker-abc.scope", "/"])
def test_a_container_that_is_told_its_path_on_the_host(tmp_path: Path, top: str) -> None:
    """Only its own cgroup is mounted, and that path is not below it."""
    own = {"proc/self/cgroup": "0::/system.slice/docker-abc.scope\n", "proc/self/mountinfo": v2_mount(top)}
    assert memory_room(tree(tmp_path, {**CONTAINER_V2, **own})).limit == 512 * MIB


@pytest.mark.parametrize(
    "told", ["0::/../../other.scope\n", "", "0::\n", "0::/\0\n", f"0::/{'x' * 5000}\n", "12:pids:/x\n"]
)
def test_a_path_that_leads_nowhere(tmp_path: Path, told: str) -> None:
    assert memory_room(tree(tmp_path, {**CONTAINER_V2, "proc/self/cgroup": told})).limit == 512 * MIB


def test_mounts_that_cannot_be_read_are_where_they_usually_are(tmp_path: Path) -> None:
    root = tree(tmp_path, {**CONTAINER_V2, "proc/self/mountinfo": ""})
    assert (memory_room(root).limit, usable_cores(root)) == (512 * MIB, 3)


def test_a_mount_elsewhere_with_a_blank_in_its_name(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/job\n",
        "proc/self/mountinfo": v2_mount("/", r"/mnt/my\040cgroups"),
        "mnt/my cgroups/job/memory.max": str(64 * MIB),
    }
    found = memory_room(tree(tmp_path, files))
    assert found == MemoryRoom(64 * MIB, 64 * MIB, "/mnt/my cgroups/job/memory.max")


def test_another_cgroups_folder_that_is_mounted_here_is_not_ours(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/ours\n",
        "proc/self/mountinfo": v2_mount("/theirs", "/watched"),
        "watched/memory.max": str(64 * MIB),
    }
    assert memory_room(tree(tmp_path, files)) == MACHINE


# -- version 1, and both ---------------------------------------------------------------------------------------------

CONTAINER_V1 = {
    "proc/self/cgroup": "5:memory:/docker/abc\n4:cpuacct,cpu:/docker/abc\n1:name=systemd:/docker/abc\n",
    "proc/self/mountinfo": v1_mounts("/docker/abc"),
    "{memory}/memory.limit_in_bytes": f"{512 * MIB}\n",
    "{memory}/memory.usage_in_bytes": f"{50 * MIB}\n",
    "{memory}/memory.stat": f"inactive_file 1\ntotal_inactive_file {9 * MIB}\ntotal_active_file {MIB}\n",
    "{cpu}/cpu.cfs_quota_us": "150000\n",
    "{cpu}/cpu.cfs_period_us": "50000\n",
}


@pytest.mark.parametrize("mounts", [v1_mounts("/docker/abc"), v1_mounts(), ""])
def test_version_1(tmp_path: Path, mounts: str) -> None:
    root = tree(tmp_path, {**CONTAINER_V1, "proc/self/mountinfo": mounts})
    assert memory_room(root) == MemoryRoom(472 * MIB, 512 * MIB, "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    assert cpu_quota(root) == CpuQuota(3.0, "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us")


def test_no_limit_in_version_1(tmp_path: Path) -> None:
    free = {"{memory}/memory.limit_in_bytes": UNLIMITED_V1, "{cpu}/cpu.cfs_quota_us": "-1\n"}
    root = tree(tmp_path, {**CONTAINER_V1, **free})
    assert (memory_room(root), cpu_quota(root)) == (MACHINE, None)


def test_a_limit_above_what_a_container_of_version_1_can_see(tmp_path: Path) -> None:
    hidden = {
        "{memory}/memory.limit_in_bytes": UNLIMITED_V1,
        "{memory}/memory.stat": f"hierarchical_memory_limit {200 * MIB}\n",
    }
    found = memory_room(tree(tmp_path, {**CONTAINER_V1, **hidden}))
    assert found == MemoryRoom(150 * MIB, 200 * MIB, "/sys/fs/cgroup/memory/memory.stat")


def test_nested_cgroups_of_version_1(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:memory:/pods/a\n4:cpu,cpuacct:/pods/a\n",
        "proc/self/mountinfo": v1_mounts(),
        "{memory}/pods/memory.limit_in_bytes": str(300 * MIB),
        "{memory}/pods/a/memory.limit_in_bytes": str(400 * MIB),
        "{cpu}/pods/cpu.cfs_quota_us": "800000",
        "{cpu}/pods/cpu.cfs_period_us": "100000",
        "{cpu}/pods/a/cpu.cfs_quota_us": "200000",
        "{cpu}/pods/a/cpu.cfs_period_us": "100000",
    }
    root = tree(tmp_path, files)
    assert memory_room(root).source == "/sys/fs/cgroup/memory/pods/memory.limit_in_bytes"
    assert cpu_quota(root) == CpuQuota(2.0, "/sys/fs/cgroup/cpu,cpuacct/pods/a/cpu.cfs_quota_us")


def test_both_versions_side_by_side(tmp_path: Path) -> None:
    """Memory is of version 1, CPU of version 2: each limit is found where its controller is."""
    files = {
        "proc/self/cgroup": "5:memory:/job\n0::/job.scope\n",
        "proc/self/mountinfo": v1_mounts() + v2_mount(folder="/sys/fs/cgroup/unified"),
        "{memory}/job/memory.limit_in_bytes": str(128 * MIB),
        "{v2}/unified/job.scope/cpu.max": "100000 100000",
    }
    root = tree(tmp_path, files)
    assert memory_room(root).limit == 128 * MIB
    assert usable_cores(root) == 1


# -- what the files must not do ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("nonsense", ["", "\n", "many", "-5", "1.5", "0x10", "9" * 5000, "1 2 3", "१२", "100000 0"])
def test_nonsense_is_no_limit(tmp_path: Path, nonsense: str) -> None:
    names = [name for name in (*CONTAINER_V1, *CONTAINER_V2) if not name.startswith("proc")]
    root = tree(tmp_path, {**CONTAINER_V1, **CONTAINER_V2, **dict.fromkeys(names, nonsense)})
    assert memory_room(root) == MACHINE
    assert cpu_quota(root) is None


def test_what_cannot_be_read_is_no_limit(tmp_path: Path) -> None:
    for name in ("{v2}/memory.max", "{v2}/cpu.max", "{memory}/memory.stat"):
        tree(tmp_path, {f"{name}/a-folder": ""})
    assert (memory_room(tmp_path), cpu_quota(tmp_path)) == (MACHINE, None)


def test_a_limit_whose_use_is_not_told_is_taken_whole(tmp_path: Path) -> None:
    root = tree(tmp_path, {"{v2}/memory.max": str(MIB), "{v2}/memory.stat": f"inactive_file {MIB}"})
    assert memory_room(root).available == MIB


def test_more_used_than_allowed_leaves_nothing(tmp_path: Path) -> None:
    assert memory_room(tree(tmp_path, {"{v2}/memory.max": "1", "{v2}/memory.current": "9"})).available == 0


PIECES = st.sampled_from(
    [*"0123456789:/,. -\n\t\0\\é", "max", "..", "cgroup", "cgroup2", " - ", "\\040", "memory", "cpu", "0::/"]
)
TEXTS = st.one_of(st.binary(max_size=60), st.lists(PIECES, max_size=40).map(lambda parts: "".join(parts).encode()))


@settings(max_examples=300)
@given(contents=st.dictionaries(st.sampled_from(sorted({*CONTAINER_V1, *CONTAINER_V2})), TEXTS))
def test_no_content_of_the_files_raises(contents: dict[str, bytes]) -> None:
    usual = {**CONTAINER_V1, **CONTAINER_V2}
    files = {f"/{name.format(**PLACES)}": text.encode() for name, text in usual.items()}
    files |= {f"/{name.format(**PLACES)}": data for name, data in contents.items()}
    with pytest.MonkeyPatch.context() as patch:  # thousands of files take a while to write
        patch.setattr(machine_limits, "_read", lambda path: os.fsdecode(files.get(str(path), b"")))
        patch.setattr(machine_limits._Cgroup, "exists", True)
        found = limits_in_force()
    assert 1 <= found["threads"] <= 16
    assert 0 <= found["memory_available"] <= MACHINE.available
    str(found).encode()  # can be printed


# -- ulimits and cores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_ulimits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    limits = {getattr(resource, name): 1000}
    unlimited = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda of: (limits.get(of, unlimited), unlimited))
    monkeypatch.setattr(machine_limits, "_mapped", lambda: {"vms": 700, "data": 700})
    assert memory_room(tmp_path) == MemoryRoom(300, 1000, name)
    monkeypatch.setattr(machine_limits, "_mapped", dict)
    assert memory_room(tmp_path).available == 1000


def test_what_is_mapped_counts_against_a_real_ulimit() -> None:
    code = """
import resource, psutil
from shoal.system.machine_limits import memory_room
limit = psutil.Process().memory_info().vms + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
room = memory_room()
print(room.source, room.limit == limit, 0 < room.available <= 64 << 20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["RLIMIT_AS", "True", "True"]


def test_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 3, 4}, raising=False)
    assert machine_limits.affinity() == 3
    monkeypatch.setattr(os, "process_cpu_count", lambda: 2, raising=False)
    assert machine_limits.affinity() == 2
    monkeypatch.setattr(os, "process_cpu_count", lambda: None, raising=False)
    assert machine_limits.affinity() == 1
    monkeypatch.delattr(os, "process_cpu_count")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine_limits.affinity() == 5


def test_an_affinity_that_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(pid: int) -> set[int]:
        raise PermissionError

    monkeypatch.undo()
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", forbidden, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine_limits.affinity() == 1


# -- in words ----------------------------------------------------------------------------------------------------------


def test_what_needs_more_than_there_is_is_refused_with_both_numbers_and_who_says_so() -> None:
    room = MemoryRoom(100, 400, "/sys/fs/cgroup/memory.max")
    room.require("the weights", 100)
    with pytest.raises(
        MemoryLimitError,
        match=r"^the weights need 101 bytes, 100 bytes of memory are available \(the limit is 400, in /sys/fs/cgroup/memory.max\)$",
    ):
        room.require("the weights", 101)
    with pytest.raises(MemoryLimitError, match=r"100 bytes of memory are available$"):
        MemoryRoom(100, 400).require("the weights", 101)


def test_a_report_of_the_limits(tmp_path: Path) -> None:
    assert limits_in_force(tree(tmp_path, CONTAINER_V2)) == {
        "affinity": 16,
        "cpu_quota": "3.5 (/sys/fs/cgroup/cpu.max)",
        "threads": 3,
        "memory_limit": 512 * MIB,
        "memory_limit_set_by": "/sys/fs/cgroup/memory.max",
        "memory_available": 472 * MIB,
    }
