"""shoal beside llama.cpp: the same file, the same token ids, taking turns on one machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from shoal.bench.machine import Machine, measure_machine
from shoal.bench.report import Comparison, Memory, Phase, Report
from shoal.bench.roofline import NetworkCost, decode_work, prefill_work
from shoal.bench.turns import OtherLoad, Worker
from shoal.bench.workload import random_ids
from shoal.errors import ParameterError
from shoal.gguf.reader import GGUFFile
from shoal.models.config import ModelConfig

ROWS_PER_STEP = 512  # on both sides


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to measure. ``batches`` prompts of ``prompt_len`` tokens are prefilled and decoded for ``output_len`` steps;
    ``prefill_lens`` are lengths of single prompts that are only prefilled. ``peer_python`` can import llama_cpp.
    """

    model: Path
    peer_python: str
    prompt_len: int = 128
    output_len: int = 32
    batches: tuple[int, ...] = (1, 4, 8, 16, 32)
    prefill_lens: tuple[int, ...] = (512,)
    rounds: int = 5
    threads: int = 2
    seed: int = 0
    device: str = "auto"
    skip_tokenizer_init: bool = False

    def cases(self) -> list[Case]:
        """All that each round measures, in order."""
        decoded = [Case(batch, self.prompt_len, self.output_len) for batch in self.batches]
        return decoded + [Case(1, length, 0) for length in self.prefill_lens]


@dataclass(frozen=True, slots=True)
class Case:
    """``batch`` prompts of ``prompt_len`` tokens, then ``steps`` decode steps."""

    batch: int
    prompt_len: int
    steps: int

    @property
    def context(self) -> int:
        """Positions that a sequence may come to hold: the first to be prefilled decode while the last ones are."""
        prefill_steps = -(-self.batch * self.prompt_len // (ROWS_PER_STEP - self.batch))
        return self.prompt_len + prefill_steps + self.steps + 1

    def prefill(self, cost: NetworkCost) -> Phase:
        """All prompts, up to the first token of each."""
        work = prefill_work(cost, self.batch, self.prompt_len, ROWS_PER_STEP)
        return Phase(self.batch, self.prompt_len, self.batch * self.prompt_len, work)

    def decode(self, cost: NetworkCost) -> Phase:
        """The steps after that, at their mean context."""
        work = decode_work(cost, self.batch, self.prompt_len + (self.steps + 1) / 2)
        return Phase(self.batch, self.prompt_len, self.batch * self.steps, work, self.steps)


@dataclass(slots=True)
class Samples:
    """Seconds of one case, a number a round: shoal's, and the peer's by setting."""

    shoal: list[dict[str, Any]] = field(default_factory=list)
    peer: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))

    def compare(self, phase: Phase, key: str, machine: Machine) -> Comparison:
        """Both sides in one phase; ``key`` is where its seconds stand."""
        peer = {setting: [turn[key] for turn in turns] for setting, turns in self.peer.items()}
        return Comparison.of(phase, [turn[key] for turn in self.shoal], peer, machine)


def compare_with_llama_cpp(plan: Plan, say: Callable[[str], None]) -> Report:
    """Let both sides take turns; ``say`` hears how it goes.

    Each side is a process that loads the model once. In each round each case is measured by shoal and then by llama.cpp,
    with each of its settings (flash attention, one KV buffer for all sequences); the best median counts, phase by phase.
    A first turn of each side warms up and is not counted.

    Raises ParameterError where ``peer_python`` cannot import llama_cpp, EngineError where a side fails.
    """
    require_llama_cpp(plan.peer_python)
    with GGUFFile.open(plan.model) as file:
        cost, vocab_size = NetworkCost.of(file), ModelConfig.from_gguf(file).vocab_size
    say("measuring the machine")
    machine = measure_machine(plan.threads, plan.device)
    say("loading the model on both sides")
    load = OtherLoad()
    with Worker("shoal", _shoal_command(plan)) as shoal, Worker("llama.cpp", _peer_command(plan)) as peer:
        samples = _Rounds(plan, shoal, peer, load, vocab_size).run(say)
    return Report(
        model=plan.model.name,
        machine=machine,
        threads=plan.threads,
        rounds=plan.rounds,
        versions={"shoal": shoal.facts["version"], "llama-cpp-python": peer.facts["version"]},
        decode=[samples[case].compare(case.decode(cost), "decode_seconds", machine) for case in samples if case.steps],
        prefill=[samples[case].compare(case.prefill(cost), "prefill_seconds", machine) for case in samples],
        memory=Memory(
            peak_rss=max(turn["peak_rss"] for taken in samples.values() for turn in taken.shoal),
            file=plan.model.stat().st_size,
            kv=shoal.facts["kv_bytes"],
        ),
        other_load=load.share,
    )


def require_llama_cpp(python: str) -> None:
    """Raise ParameterError, saying how to install it, unless this interpreter can import llama_cpp."""
    try:
        done = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False)
        importable = done.returncode == 0
    except OSError:
        importable = False
    if not importable:
        raise ParameterError(
            "peer_python", python, f"a Python that can import llama_cpp: `{python} -m pip install llama-cpp-python`"
        )


@dataclass(frozen=True, slots=True)
class _Rounds:
    """The turns of both sides."""

    plan: Plan
    shoal: Worker
    peer: Worker
    load: OtherLoad
    vocab_size: int

    def run(self, say: Callable[[str], None]) -> dict[Case, Samples]:
        """The first case once to warm up; then the rounds."""
        cases = self.plan.cases()
        self.take_turns(cases[0], Samples())
        samples = {case: Samples() for case in cases}
        for number in range(1, self.plan.rounds + 1):
            for case in cases:
                say(f"round {number}/{self.plan.rounds}: {case.batch} x {case.prompt_len} tokens, {case.steps} steps")
                self.take_turns(case, samples[case])
        return samples

    def take_turns(self, case: Case, samples: Samples) -> None:
        """shoal, then the peer with each of its settings."""
        prompts = random_ids(case.batch, case.prompt_len, self.vocab_size, self.plan.seed)
        turn = {"prompts": prompts, "steps": case.steps}
        samples.shoal.append(self.load.watch(self.shoal, turn))
        for name, setting in _peer_settings(case):
            samples.peer[name].append(self.load.watch(self.peer, turn | setting))


def _peer_settings(case: Case) -> Iterator[tuple[str, dict[str, bool]]]:
    """llama.cpp's choices; with one sequence there is nothing to unify."""
    for flash_attn, kv_unified in product((True, False), (True, False) if case.batch > 1 else (False,)):
        name = f"fa {'on' if flash_attn else 'off'}" + (", unified kv" if kv_unified else "")
        yield name, {"flash_attn": flash_attn, "kv_unified": kv_unified}


def _shoal_command(plan: Plan) -> list[str]:
    cases = plan.cases()
    settings = {
        "model": str(plan.model),
        "threads": plan.threads,
        "device": plan.device,
        "max_num_seqs": max(case.batch for case in cases),
        "max_num_batched_tokens": ROWS_PER_STEP,
        "max_model_len": max(case.context for case in cases),
        "skip_tokenizer_init": plan.skip_tokenizer_init,
    }
    return [sys.executable, "-m", "shoal.bench.shoal_worker", json.dumps(settings)]


def _peer_command(plan: Plan) -> list[str]:
    settings = {"model": str(plan.model), "threads": plan.threads}
    script = Path(__file__).with_name("llama_worker.py")
    return [plan.peer_python, str(script), json.dumps(settings)]
