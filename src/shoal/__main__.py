"""``python -m shoal`` is the command line. ``python -m shoal bench gpu`` needs none of its packages: NumPy, torch and Triton do."""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> int:
    """The exit code."""
    if arguments[:2] == ["bench", "gpu"]:
        from shoal.bench.gpu.main import main as bench_gpu

        return bench_gpu(arguments[2:])
    from shoal.cli.main import main as command_line

    return command_line(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
