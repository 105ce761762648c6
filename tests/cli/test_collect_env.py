"""``shoal collect-env``: the facts of a bug report, for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path

from shoal import __version__
from tests.cli.conftest import Shoal


def test_json_holds_the_facts(shoal: Shoal, cache: Path) -> None:
    done = shoal("collect-env", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    assert facts["shoal"] == __version__
    assert facts["models_folder"] == str(cache)
    assert 1 <= facts["threads"] <= facts["affinity"]
    assert 0 < facts["memory_available"] <= facts["memory_limit"] <= facts["memory"]
    assert facts["isa"] in ("avx512vnni", "avxvnni", "avx2", "neon-i8mm", "neon-dotprod", "portable")
    assert facts["packages"]["numba"]


def test_lines_say_the_same(shoal: Shoal) -> None:
    lines = dict(line.split(None, 1) for line in shoal("collect-env").stdout.splitlines() if len(line.split()) > 1)
    assert lines["shoal"] == __version__
    assert lines["memory"].endswith(" GiB")
    assert "numba " in lines["packages"]
