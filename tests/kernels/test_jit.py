"""The kernel cache: the first process compiles and says so, the second finds everything there; and when there is no such place."""

from __future__ import annotations

import gc
import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from numba import config

import shoal.kernels.cpu
from shoal.errors import ParameterError, UnsupportedError
from shoal.kernels.cpu import attention, isa, jit, machine_code
from shoal.kernels.cpu.cache import KernelStore
from shoal.kernels.cpu.jit import Lazy
from shoal.kernels.cpu.later import Later
from tests.support.other_user import UID, as_nobody_known, public_folder

PROGRAM = """
import os
import sys

from shoal.kernels.cpu import elementwise
from shoal.kernels.cpu.jit import Lazy
from shoal.kernels.cpu.pool import Pool

compiled = []
Lazy.on_compile = compiled.append
Pool(2).close()
assert elementwise.add_bias.address
assert compiled or "numba" not in sys.modules or any(name.startswith("NUMBA_") for name in os.environ)
print(*compiled)
"""
NAMES = ["run_program", "work", "wake", "add_bias"]
FILES = ["elementwise.add_bias", "pool.run_program", "pool.wake", "pool.work"]


def _run(settings: dict[str, str], before: list[str] | None = None) -> tuple[list[str], str]:
    """The names of what was compiled, and stderr. ``before`` stands before the command, which then has no other environment but
    what programs and kernels are chosen by."""
    kept = {name: os.environ[name] for name in ("PATH", "SHOAL_ISA") if name in os.environ}
    environment = {**(kept if before else os.environ), **settings, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*(before or []), sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that a process has filled."""
    folder = tmp_path_factory.mktemp("filled")
    assert _run({"SHOAL_KERNEL_CACHE": str(folder)}) == (NAMES, "")
    return folder


@pytest.fixture
def cache(filled: Path, tmp_path: Path) -> Path:
    return shutil.copytree(filled, tmp_path / "kernels")


def _files(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_second_process_compiles_nothing(cache: Path) -> None:
    assert list(_files(cache)) == FILES
    assert _run({"SHOAL_KERNEL_CACHE": str(cache)}) == ([], "")


def test_damaged_files_are_compiled_again(cache: Path) -> None:
    for name, path in _files(cache).items():
        good = path.read_bytes()
        bad = {"run_program": b"", "work": good[: len(good) // 2], "wake": os.urandom(500)}
        path.write_bytes(bad.get(name.partition(".")[2], good))
    compiled, said = _run({"SHOAL_KERNEL_CACHE": str(cache)})
    assert compiled == NAMES[:3]
    assert said.startswith("shoal: compiled kernel ")
    assert said.count("\n") == 1
    (key,) = cache.iterdir()
    assert all(KernelStore(cache, key.name).load(name) for name in FILES)


def test_settings_of_numba_do_not_matter(cache: Path) -> None:
    settings = {
        "SHOAL_KERNEL_CACHE": str(cache),
        "NUMBA_CACHE_DIR": "/nowhere",
        "NUMBA_CACHE_LOCATOR_CLASSES": "nosuch.Locator",
        "NUMBA_NUM_THREADS": "1",
        "NUMBA_THREADING_LAYER": "tbb",
        "NUMBA_FULL_TRACEBACKS": "1",
    }
    assert _run(settings) == ([], "")


def test_a_setting_that_changes_code_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {jit._key(jit._sources())}
    for name, value in (("OPT", 0), ("DEBUGINFO_DEFAULT", 1), ("CPU_FEATURES", "-avx2"), ("CPU_NAME", "x86-64")):
        monkeypatch.setattr(config, name, value)
        keys.add(jit._key(jit._sources()))
    assert len(keys) == 5


def test_every_source_of_the_kernels_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = shutil.copytree(Path(jit.__file__).parent, tmp_path / "cpu")
    monkeypatch.setattr(jit, "__file__", str(sources / "jit.py"))
    keys = {jit._key(jit._sources())}
    for name in ("groups.py", "simd/floats.py"):
        (sources / name).write_text("# another")
        keys.add(jit._key(jit._sources()))
    assert len(keys) == 3


def test_a_user_without_home_and_account_keeps_kernels_in_a_temporary_folder() -> None:
    nobody = as_nobody_known()
    with public_folder() as folder:
        private = folder / f"shoal-kernels-{UID}"
        compiled, said = _run({"TMPDIR": str(folder)}, nobody)
        assert compiled == NAMES
        assert said.startswith(f"shoal: this user has no home folder: kernels are kept in {private}")
        assert list(_files(private)) == FILES


def test_a_filled_cache_of_root_is_used_by_others(filled: Path) -> None:
    nobody = as_nobody_known()
    with public_folder() as folder:
        shutil.copytree(filled, folder / "kernels")
        settings = {"SHOAL_KERNEL_CACHE": str(folder / "kernels"), "HOME": "/nonexistent", "TMPDIR": str(folder)}
        assert _run(settings, nobody) == ([], "")
        assert not list(folder.glob("shoal-kernels-*"))


def test_numba_that_may_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "DISABLE_JIT", 1)
    with pytest.raises(ParameterError, match="NUMBA_DISABLE_JIT: got 1, must be 0 or not set"):
        Lazy(_files).get()


def test_numba_that_cannot_be_imported_is_one_line() -> None:
    program = "from shoal.kernels.load import load_backend; load_backend()"
    environment = {**os.environ, "NUMBA_NUM_THREADS": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stderr.splitlines()[-1].startswith(
        "shoal.errors.UnsupportedError: Numba cannot be imported: Number of threads"
    )


def test_the_defaults_are_those_of_numba() -> None:
    """What this process finds without Numba's help is what Numba says."""
    program = """
from llvmlite import binding
from shoal.kernels.cpu import isa, jit

names = {**jit._SETTINGS, "CPU_NAME": None, "CPU_FEATURES": None, "DISABLE_JIT": 0}
alone = [isa.setting(name, default) for name, default in names.items()], isa.target(), jit._key(jit._sources())
from numba import config
from numba.core.codegen import get_host_cpu_features

assert list(map(str, alone[0])) == [str(getattr(config, name)) for name in names]
assert alone[1:] == (isa.target(), jit._key(jit._sources()))
assert isa.target()[1] == get_host_cpu_features() == isa._host_features()
assert config.ENABLE_AVX == (binding.get_host_cpu_name() not in isa._SLOW_AVX)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "SHOAL_ISA"))}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", program], env=environment, cwd="/", timeout=120, check=True)


def test_everything_that_kernels_name_is_there() -> None:
    for module in pkgutil.walk_packages(shoal.kernels.cpu.__path__, "shoal.kernels.cpu."):
        importlib.import_module(module.name)
    found = [later for later in gc.get_objects() if isinstance(later, Later)]
    assert len(found) > 100
    assert all(later.made is not None for later in found)


def test_no_two_kernels_are_kept_under_one_name() -> None:
    for module in pkgutil.walk_packages(shoal.kernels.cpu.__path__, "shoal.kernels.cpu."):
        importlib.import_module(module.name)
    for kind in range(3):
        for tile in (1, 2):
            attention.score(kind, tile)
            attention.weigh(kind, tile)
    names = [found.cache_name for found in gc.get_objects() if isinstance(found, Lazy) and found.cache_name]
    assert len(names) > 100
    assert sorted(names) == sorted(set(names))


def test_code_from_elsewhere_is_not_kept() -> None:
    assert Lazy(_files).cache_name is None


def test_nothing_is_compiled_of_files_that_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are another version's, and what comes of them would be kept as this one's."""
    monkeypatch.setattr(jit, "_SOURCES", b"as they were")
    jit._unchanged.cache_clear()
    try:
        with pytest.raises(UnsupportedError, match="were changed since this process began"):
            jit._compiling()
    finally:
        jit._unchanged.cache_clear()


def test_memory_that_may_not_become_executable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("llvmlite.binding.check_jit_execution", refuse)
    with pytest.raises(UnsupportedError, match="cannot be run here: Operation not permitted"):
        machine_code._target.__wrapped__()


@pytest.mark.parametrize("cpu", ["nocona", "sandybridge"])
def test_numba_compiles_for_what_was_decided(cpu: str) -> None:
    """It thinks of some CPUs that their AVX is not to be used."""
    program = f"""
from llvmlite import binding
binding.get_host_cpu_name = lambda: {cpu!r}
from shoal.kernels.cpu import isa
assert "+avx" not in isa.TARGET[1]
from shoal.kernels.cpu import compiling
assert compiling.config.ENABLE_AVX is False or compiling.config.CPU_NAME == isa.TARGET[0]
assert isa.target() == isa.TARGET
assert compiling._HEARD
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "SHOAL_ISA"))}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", program], env=environment, cwd="/", check=True, timeout=120)


def test_code_of_another_target_is_not_kept(tmp_path: Path) -> None:
    """A program that has compiled something with Numba before: Numba has made its mind up about the CPU then."""
    if "avx512f" not in isa.cpu_features():
        pytest.skip("the CPU has nothing beyond AVX2 that could be used by mistake")
    own = "import shoal.kernels.cpu.isa\nimport numba\nnumba.njit(lambda x: x + 1)(1)\n"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    environment |= {"SHOAL_ISA": "avx2", "SHOAL_KERNEL_CACHE": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    program = "from shoal.kernels.cpu import elementwise\nassert elementwise.add_bias.address\n"
    kept = []
    for code in (own + program, program):
        subprocess.run([sys.executable, "-c", code], env=environment, cwd="/", check=True, timeout=120)
        kept.append(sorted(path.name for path in tmp_path.rglob("*add_bias*")))
    assert [len(files) for files in kept] == [0, 1]
