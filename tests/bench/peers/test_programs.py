"""The peers: who can be imported where, what starts them, which settings they try."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from shoal.bench.peers.programs import LLAMA_CPP, OPENVINO, Peer, importable
from shoal.errors import ParameterError

PRESENT = Peer("present", "json", "a-package", "llama_worker.py", LLAMA_CPP.settings)
ABSENT = Peer("absent", "no_such_module", "no-such-package", "llama_worker.py", LLAMA_CPP.settings)


def test_only_what_can_be_imported_takes_part() -> None:
    assert importable({ABSENT: sys.executable, PRESENT: sys.executable}) == [PRESENT]


def test_no_peer_at_all_says_how_to_get_them(tmp_path: Path) -> None:
    pythons = {ABSENT: sys.executable, PRESENT: str(tmp_path / "python")}
    with pytest.raises(ParameterError, match="a Python that can import no_such_module or json") as refused:
        importable(pythons)
    assert refused.value.field == "peer_python"
    assert f"`{sys.executable} -m pip install no-such-package` or `{tmp_path}/python -m pip" in str(refused.value)


@pytest.mark.parametrize("peer", [LLAMA_CPP, OPENVINO])
def test_a_worker_is_a_script_of_its_own(peer: Peer) -> None:
    python, script, settings = peer.command("some/python", {"threads": 2})
    assert (python, json.loads(settings)) == ("some/python", {"threads": 2})
    source = Path(script).read_text()
    assert f"import {peer.module}" in source
    assert "from shoal" not in source


@pytest.mark.parametrize(("peer", "alone", "together"), [(LLAMA_CPP, 2, 4), (OPENVINO, 2, 2)])
def test_settings_have_names_of_their_own(peer: Peer, alone: int, together: int) -> None:
    for batch, count in ((1, alone), (2, together)):
        settings = dict(peer.settings(batch))
        assert len(settings) == len({json.dumps(setting) for setting in settings.values()}) == count
