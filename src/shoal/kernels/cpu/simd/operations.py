"""All operations by name: where the package finds them."""

from shoal.kernels.cpu.simd.floats import *  # noqa: F403
from shoal.kernels.cpu.simd.integers import *  # noqa: F403
from shoal.kernels.cpu.simd.memory import *  # noqa: F403
