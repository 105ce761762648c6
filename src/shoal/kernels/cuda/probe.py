"""What a GPU can do at most, and how long something takes on it: for ``shoal bench gpu``.

Under Triton's interpreter everything is on the CPU and takes whatever it takes: that runs the same code, and measures nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import triton

from shoal.kernels.cuda import linear, tune
from shoal.kernels.cuda.launch import INTERPRETED, device
from shoal.kernels.cuda.pack import PackedMatrix

Run = Callable[[], object]
Use = Literal[
    "", "gated", "floats"
]  # of weights: with a gate; or behind attention or a gate, whose rows are rounded as they are read
_FORMS: dict[Use, linear.Form] = {
    "": linear.PLAIN,
    "gated": linear.Form(gated=True),
    "floats": linear.Form(floats=True),
}


class Probe:
    """The GPU that is there. Raises UnsupportedError where there is none."""

    def __init__(self) -> None:
        self._device = device()
        self.interpreted = INTERPRETED

    def describe(self) -> dict[str, Any]:
        """What it is, and with which versions."""
        found: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__}
        if self.interpreted:
            return {"name": "Triton's interpreter, on the CPU", **found}
        properties = torch.cuda.get_device_properties(self._device)
        capability = f"{properties.major}.{properties.minor}"
        memory = {"memory": properties.total_memory, "multiprocessors": properties.multi_processor_count}
        return {"name": properties.name, "capability": capability, **memory, **found}

    def synchronise(self) -> None:
        """Wait for everything that was launched."""
        if not self.interpreted:
            torch.cuda.synchronize(self._device)

    def memory_used(self) -> int:
        """Bytes that are taken on the device, by torch's count."""
        return 0 if self.interpreted else torch.cuda.memory_allocated(self._device)

    def release(self) -> None:
        """Give back what nobody refers to any more."""
        if not self.interpreted:
            torch.cuda.empty_cache()

    def wall_seconds(self, run: Run, times: int) -> float:
        """Of one ``run``, the host's part too, when so many follow one another."""
        self.synchronise()
        start = time.perf_counter()
        for _ in range(times):
            run()
        self.synchronise()
        return (time.perf_counter() - start) / times

    def device_seconds(self, run: Run, rounds: int = 5, times: int = 10) -> float:
        """Of one ``run`` on the device, which has so many to do at a time; the median. The first runs warm up."""
        run()
        return statistics.median(self._round(run, times) for _ in range(rounds))

    def _round(self, run: Run, times: int) -> float:
        if self.interpreted:
            return self.wall_seconds(run, 1)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / times

    def kernel_seconds(self, run: Run) -> float:
        """How long kernels and copies ran on the device during ``run``, one after the other. Raises RuntimeError where the system
        does not let a process watch."""
        activities = [torch.profiler.ProfilerActivity.CPU if self.interpreted else torch.profiler.ProfilerActivity.CUDA]
        self.synchronise()
        with torch.profiler.profile(activities=activities) as profile:
            run()
            self.synchronise()
        total = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6
        if not total and not self.interpreted:
            raise RuntimeError("the profiler saw nothing of the device")
        return float(total)

    def copy_bandwidth(self, num_bytes: int) -> float:
        """Bytes a second, read and written, of a copy of so many on the device."""
        source = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        return 2 * num_bytes / self.device_seconds(lambda: target.copy_(source))

    def matmul_seconds(self, shapes: Sequence[tuple[int, int]], rows: int) -> float:
        """Of torch's float16 products of ``rows`` rows with weights of all ``shapes`` (rows, columns), one after the other."""
        kind = {"dtype": torch.float16, "device": self._device}
        work = [
            (torch.randn((rows, k), **kind), torch.randn((n, k), **kind)) for n, k in shapes
        ]  # zeros would be faster

        def run() -> None:
            for x, weight in work:
                torch.nn.functional.linear(x, weight)

        return self.device_seconds(run)

    def tune(self, products: Sequence[tuple[object, Use]], rows: Sequence[int], limit: float) -> dict[str, Any]:
        """Choose tiles for products of weights (those of another backend are left out), as they are used, with up to so many rows, for
        networks that are bound later; keep them in the cache folder. After ``limit`` seconds no more are chosen. Returns what was, as
        it is in the file."""
        ours = [(matrix, _FORMS[use]) for matrix, use in products if isinstance(matrix, PackedMatrix)]
        end = time.monotonic() + limit
        found = tune.tune(
            ours, rows, lambda run: self.device_seconds(run, rounds=3, times=3), lambda: time.monotonic() > end
        )
        path = tune.table_path()
        if found and path is not None and not self.interpreted:
            tune.save(path, linear.TUNED)
        return tune.entries(found)
