"""``shoal bench`` as a user runs it: flags, words, JSON files, refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
import pytest

from shoal.cli.bench import bench
from shoal.cli.perplexity import perplexity
from shoal.gguf.reader import GGUFFile
from tests.cli.conftest import Shoal
from tests.support.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


def test_throughput(shoal: Shoal, tiny: Path, tmp_path: Path) -> None:
    flags = ["--num-prompts", 5, "--input-len", 6, "--output-len", 4, "--device", "reference", "--compare-sequential"]
    done = shoal("bench", "throughput", tiny, *map(str, flags), "--output-json", "out.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Throughput: ")
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["num_requests"], found["total_num_tokens"]) == (5, 5 * 10)
    assert found["tokens_per_second"] == pytest.approx(50 / found["elapsed_time"])
    assert found["speedup"] == pytest.approx(found["sequential_time"] / found["elapsed_time"])


def test_throughput_of_a_file(shoal: Shoal, tiny: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "abc"}\n{"prompt": "defgh"}\n')
    flags = ["--dataset-name", "custom", "--dataset-path", prompts, "--output-len", "2", "--device", "reference"]
    done = shoal("bench", "throughput", "--model", tiny, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["Total num prompt tokens:  8", "Total num output tokens:  4"]


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_latency(shoal: Shoal, tiny: Path, tmp_path: Path, device: str) -> None:
    flags = ["--batch-size", 2, "--input-len", 5, "--output-len", 3, "--num-iters-warmup", 1, "--num-iters", 4]
    done = shoal("bench", "latency", tiny, *map(str, flags), "--device", device, "--output-json", "out.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Avg latency: ")
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["latencies"]) == 4
    assert list(found["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert found["avg_latency"] == pytest.approx(sum(found["latencies"]) / 4)


def test_mixed(shoal: Shoal, tiny: Path, tmp_path: Path) -> None:
    """With a target the same is measured without one first."""
    sizes = {
        "batch-size": 2,
        "input-len": 5,
        "output-len": 9,
        "num-prefills": 3,
        "prefill-len": 40,
        "prefill-interval": 0,
    }
    flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    more = ["--device", "reference", "--target-step-ms", "20", "--output-json", "out.json"]
    done = shoal("bench", "mixed", tiny, *flags, *more)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert (
        [line.split(":")[0] for line in done.stdout.splitlines()] == list(found) == ["without a target", "target 20 ms"]
    )
    assert all(list(result["inter_token_latency"]) == ["50", "90", "99"] for result in found.values())


def test_speculative(shoal: Shoal, tiny: Path, tmp_path: Path) -> None:
    sizes = {"num-prompts": 2, "rounds": 1, "output-len": 12, "batch-size": 2, "acceptance": "60,100"}
    flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    more = ["--workload", "chat", "--workload", "replay", "--device", "reference", "--output-json", "out.json"]
    done = shoal("bench", "speculative", tiny, *flags, *more)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    names = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert names == list(found) == ["chat", "replay at 60 %", "replay at 100 %"]
    assert all(len(result["seconds"]) == len(result["plain_seconds"]) == 1 for result in found.values())


@pytest.mark.parametrize(
    "command",
    [bench.commands[name] for name in ("throughput", "latency", "mixed", "speculative")] + [perplexity],
)
def test_what_repeats_prompts_has_no_prefix_cache_unless_asked(command: click.Command) -> None:
    (flag,) = (option for option in command.params if option.name == "enable_prefix_caching")
    assert flag.get_default(click.Context(command)) is False


def test_the_tokenizer_may_be_left_out(shoal: Shoal, tiny: Path) -> None:
    flags = ["--num-iters-warmup", "0", "--num-iters", "1", "--output-len", "2", "--device", "reference"]
    done = shoal("bench", "latency", tiny, *flags, "--disable-detokenize")
    assert done.returncode == 0, done.stderr


def test_peers_without_the_peer_says_how_to_get_it(shoal: Shoal, tiny: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    python.chmod(0o755)
    done = shoal("bench", "peers", tiny, "--peer-python", python)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert f"{python} -m pip install llama-cpp-python" in done.stderr


def test_quantize_without_llama_cpp_says_how_to_get_it(shoal: Shoal, tiny: Path, tmp_path: Path) -> None:
    done = shoal("bench", "quantize", tiny, "Q4_K_M", "out.gguf", "--peer-python", tmp_path / "none")
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install llama-cpp-python" in done.stderr
    assert not (tmp_path / "out.gguf").exists()


def test_a_random_model_is_written(shoal: Shoal, tiny: Path, tmp_path: Path) -> None:
    flags = ["--shape", "smollm2-135m", "--type", "IQ1_S", "--tokenizer-from", tiny]
    done = shoal("bench", "random-model", "out.gguf", *flags)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    with GGUFFile.open(tmp_path / "out.gguf") as file:
        assert file.tensors["blk.29.ffn_down.weight"].format.name == "IQ1_S"
        assert file.tensors["token_embd.weight"].shape == (49152, 576)


@pytest.mark.parametrize(
    ("flag", "value", "message"), [("--shape", "big", "one of llama-1b"), ("--type", "Q4_Q", "one of Q4_K_M")]
)
def test_what_no_random_model_has_is_refused(
    shoal: Shoal, tiny: Path, tmp_path: Path, flag: str, value: str, message: str
) -> None:
    done = shoal("bench", "random-model", "out.gguf", "--tokenizer-from", tiny, flag, value)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["throughput", "--dataset-name", "custom"], "--dataset-path FILE go together"),
        (["throughput", "--num-prompts", "0"], "--num-prompts"),
        (["throughput", "--input-len", "600"], "max_model_len"),
        (["latency", "--batch-size", "-1"], "--batch-size"),
        (["peers", "--batch", "1,0"], "numbers from 1 to 256"),
        (["peers", "--batch", ""], "numbers from 1 to 256"),
        (["peers", "--prefill-len", "8,x"], "'8,x'"),
    ],
)
def test_what_cannot_be_is_one_line(shoal: Shoal, tiny: Path, arguments: list[str], message: str) -> None:
    verb, *flags = arguments
    device = [] if verb == "peers" else ["--device", "reference"]
    done = shoal("bench", verb, tiny, *flags, *device)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
