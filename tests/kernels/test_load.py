"""Which backend a device stands for, and what is said where there is none. No test here needs a GPU, torch or Triton."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from shoal.errors import ParameterError, UnsupportedError
from shoal.kernels import load
from shoal.kernels.load import find_device, load_backend
from shoal.kernels.reference import ReferenceBackend
from shoal.params import EngineConfig

BACKEND, LAUNCH = "shoal.kernels.cuda.backend", "shoal.kernels.cuda.launch"


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch and Triton are installed."""
    monkeypatch.setattr(load, "find_spec", lambda name: name)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There is the device node of a driver."""
    monkeypatch.setattr(load, "_DRIVERS", (tmp_path / "absent", tmp_path))


def found(monkeypatch: pytest.MonkeyPatch, *, interpreted: bool = False) -> None:
    """Torch sees a GPU, or Triton interprets."""
    module = SimpleNamespace(device=lambda: "cuda:0", INTERPRETED=interpreted)
    monkeypatch.setattr(load, "import_module", {LAUNCH: module}.__getitem__)


@pytest.mark.usefixtures("packages", "driver")
def test_auto_takes_a_gpu_that_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch)
    assert find_device("auto") == "cuda"
    found(monkeypatch, interpreted=True)  # a choice for tests, which nobody makes by accident
    assert find_device("auto") == "cpu"


@pytest.mark.usefixtures("packages", "driver")
@pytest.mark.parametrize(
    "error", [UnsupportedError("no GPU"), ImportError("torch"), OSError("libcuda"), RuntimeError()]
)
def test_auto_is_the_cpu_where_torch_does_not_work(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(load, "import_module", fail)
    assert find_device("auto") == "cpu"


def test_auto_imports_no_torch_without_a_driver() -> None:
    program = (
        "import sys; from shoal.kernels import load; load._DRIVERS = (); load.load_backend().close();"
        "print(load.find_device('auto'), sorted(sys.modules.keys() & {'torch', 'triton'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "cpu []"


@pytest.mark.usefixtures("driver")
def test_without_torch_auto_is_the_cpu_and_cuda_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    assert find_device("auto") == "cpu"
    with pytest.raises(UnsupportedError, match=r"torch and triton not installed: pip install 'shoal\[cuda\]'"):
        load_backend("cuda")
    monkeypatch.setattr(load, "find_spec", lambda name: name if name == "torch" else None)
    with pytest.raises(UnsupportedError, match="cuda: triton not installed"):
        load_backend("cuda")


@pytest.mark.usefixtures("packages")
def test_a_torch_that_cannot_be_imported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError("libcudart.so.13: cannot open")

    monkeypatch.setattr(load, "import_module", fail)
    with pytest.raises(UnsupportedError, match=r"libcudart.so.13: cannot open \(another build: pip"):
        load_backend("cuda")


@pytest.mark.usefixtures("packages")
def test_cuda_gets_its_share_of_memory_and_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    shares, heard = [], list[str]()

    def backend(*, gpu_memory_utilization: float, on_kernel: object, compile_at_load: bool) -> ReferenceBackend:
        assert (on_kernel, compile_at_load) == (heard.append, True)
        shares.append(gpu_memory_utilization)
        if gpu_memory_utilization == 1:
            raise UnsupportedError("device cuda: no GPU found")
        return ReferenceBackend()

    monkeypatch.setattr(load, "import_module", {BACKEND: SimpleNamespace(CudaBackend=backend)}.__getitem__)
    load_backend("cuda", None, heard.append, gpu_memory_utilization=0.5)
    with pytest.raises(UnsupportedError, match="no GPU found"):
        load_backend("cuda", None, heard.append, gpu_memory_utilization=1)
    assert shares == [0.5, 1]


def test_devices_are_named_by_their_name() -> None:
    assert [find_device(name) for name in ("cpu", "cuda", "reference")] == ["cpu", "cuda", "reference"]
    with pytest.raises(ParameterError, match="device: got 'gpu', must be one of auto, cpu, cuda, reference"):
        load_backend("gpu")


@pytest.mark.parametrize(("given", "meant"), [("auto", "auto"), ("all", "all"), (0, 0), ("12", 12), (7.0, 7)])
def test_gpu_layers_is_a_number_or_a_word(given: int | str, meant: int | str) -> None:
    assert EngineConfig(device="cuda", gpu_layers=given).gpu_layers == meant


@pytest.mark.parametrize("given", [-1, "some", "-1", "1.5", 1.5, True, None, ""])
def test_other_gpu_layers_are_refused(given: int | str) -> None:
    with pytest.raises(ParameterError, match=r"gpu_layers: got .*, must be auto, all or a whole number from 0 on"):
        EngineConfig(gpu_layers=given)


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_without_a_gpu_there_is_nothing_to_put_there(device: str) -> None:
    assert EngineConfig(device=device, gpu_layers=0).gpu_layers == 0
    for layers in ("all", 1):
        with pytest.raises(ParameterError, match=f"gpu_layers: got .*, must be auto or 0 with device {device}"):
            EngineConfig(device=device, gpu_layers=layers)


@pytest.mark.parametrize("share", [0.0, 1.1, -0.5, "much"])
def test_the_share_of_memory_is_a_share(share: float) -> None:
    with pytest.raises(ParameterError, match="gpu_memory_utilization"):
        EngineConfig(gpu_memory_utilization=share)
