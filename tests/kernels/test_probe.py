"""The probes do the multiply-adds that they say: all operands are 1, so the sums add up to their number."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.kernels.cpu.isa import HAS
from shoal.kernels.cpu.probe import Probe


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("floats", [True, False])
def test_sums_add_up_to_the_products_done(threads: int, floats: bool) -> None:
    probe = Probe(threads, floats=floats, steps=1000)
    probe.run()
    if HAS.int16_sums and not floats:  # products that are not added up
        assert (probe.sums.view(np.int16) == 2).all()
        probe.close()
        return
    kind = np.float32 if floats else np.int32
    assert probe.sums.view(kind).sum(dtype=np.float64) == probe.macs > 0
    probe.close()
