"""shoal beside its peers: the same file, the same token ids, taking turns on one machine."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from shoal.bench.machine import Machine, measure_machine
from shoal.bench.peers.programs import Peer, importable
from shoal.bench.peers.report import Comparison, Memory, Phase, Report
from shoal.bench.roofline import NetworkCost, decode_work, prefill_work
from shoal.bench.turns import Answer, OtherLoad, Turn, Worker
from shoal.bench.workload import random_ids
from shoal.errors import EngineError
from shoal.gguf.reader import GGUFFile
from shoal.models.config import ModelConfig

ROWS_PER_STEP = 512  # on every side
_CLOSE = 1.1  # a setting that takes so much longer than the best in the first round is not measured again
_WARM_UP_LEN = 16

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to measure. ``batches`` prompts of ``prompt_len`` tokens are prefilled and decoded for ``output_len`` steps;
    ``prefill_lens`` are lengths of single prompts that are only prefilled. ``pythons``: each peer's interpreter.
    """

    model: Path
    pythons: Mapping[Peer, str]
    prompt_len: int = 128
    output_len: int = 32
    batches: tuple[int, ...] = (1, 4, 8, 16, 32)
    prefill_lens: tuple[int, ...] = (512,)
    rounds: int = 5
    threads: int = 2
    seed: int = 0
    device: str = "cpu"
    skip_tokenizer_init: bool = False

    def cases(self) -> list[Case]:
        """All that each round measures, in order."""
        decoded = [Case(batch, self.prompt_len, self.output_len) for batch in self.batches]
        return decoded + [Case(1, length, 0) for length in self.prefill_lens]

    @property
    def sequences(self) -> int:
        """Most sequences at once."""
        return max(case.batch for case in self.cases())

    @property
    def context(self) -> int:
        """Most positions that a sequence may come to hold."""
        return max(case.context for case in self.cases())


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
    """Seconds of one case, a turn a round: shoal's, and those of each peer by setting."""

    shoal: list[Answer] = field(default_factory=list)
    peers: dict[str, dict[str, list[Answer]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))

    def compare(self, phase: Phase, key: str, machine: Machine) -> Comparison:
        """All sides in one phase; ``key`` is where its seconds stand."""
        peers = {name: _seconds(turns, key) for name, turns in self.peers.items() if turns}
        return Comparison.of(phase, [turn[key] for turn in self.shoal], peers, machine)


def _seconds(turns: Mapping[str, Sequence[Answer]], key: str) -> dict[str, list[float]]:
    """Of the settings that were measured in every round."""
    rounds = max(map(len, turns.values()))
    return {setting: [turn[key] for turn in taken] for setting, taken in turns.items() if len(taken) == rounds}


def compare_with_peers(plan: Plan, say: Say) -> Report:
    """Let all sides take turns; ``say`` hears how it goes.

    Each side is a process that loads the model once. In each round each case is measured by shoal and then by each peer with
    each of its settings; the best median counts, phase by phase. A first, short turn of each side warms up and is not counted.
    A peer that cannot run the file, or fails in a turn, is left out from there on, and the report says why.

    Raises ParameterError where no peer can be imported, EngineError where shoal fails.
    """
    found = importable(plan.pythons)
    missing = {peer.name: f"{peer.name}: cannot import {peer.module}" for peer in plan.pythons if peer not in found}
    with GGUFFile.open(plan.model) as file:
        cost, vocab_size = NetworkCost.of(file), ModelConfig.from_gguf(file).vocab_size
        formats = Counter(info.format.name for info in file.tensors.values() if len(info.shape) == 2)
    say("measuring the machine")
    machine = measure_machine(plan.threads, plan.device)
    say("loading the model on all sides")
    with ExitStack() as stack:
        shoal = stack.enter_context(Worker("shoal", _shoal_command(plan)))
        rounds = _Rounds(plan, shoal, vocab_size, say, missing)
        for peer in found:
            rounds.start(peer, stack)
        samples = rounds.run()
    return Report(
        model=plan.model.name,
        formats=dict(formats),
        machine=machine,
        threads=plan.threads,
        rounds=plan.rounds,
        versions={"shoal": shoal.facts["version"]} | rounds.versions,
        not_run=rounds.not_run,
        decode=[samples[case].compare(case.decode(cost), "decode_seconds", machine) for case in samples if case.steps],
        prefill=[samples[case].compare(case.prefill(cost), "prefill_seconds", machine) for case in samples],
        memory=Memory(
            peak_rss=max(turn["peak_rss"] for taken in samples.values() for turn in taken.shoal),
            file=plan.model.stat().st_size,
            kv=shoal.facts["kv_bytes"],
        ),
        other_load=rounds.load.share,
    )


@dataclass(slots=True)
class _Rounds:
    """The turns of all sides. ``not_run``: why a peer does not take part, or not to the end."""

    plan: Plan
    shoal: Worker
    vocab_size: int
    say: Say
    not_run: dict[str, str]
    peers: dict[Peer, Worker] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    load: OtherLoad = field(default_factory=OtherLoad)

    def start(self, peer: Peer, stack: ExitStack) -> None:
        """Have a peer load the model."""
        try:
            worker = stack.enter_context(Worker(peer.name, _peer_command(self.plan, peer)))
        except EngineError as error:
            self.leave_out(peer, error)
        else:
            self.peers[peer] = worker
            self.versions[peer.package] = worker.facts["version"]

    def run(self) -> dict[Case, Samples]:
        """The first case once with short prompts, to warm up; then the rounds."""
        cases = self.plan.cases()
        self.take_turns(Case(cases[0].batch, min(cases[0].prompt_len, _WARM_UP_LEN), 1), Samples())
        samples = {case: Samples() for case in cases}
        for number in range(1, self.plan.rounds + 1):
            for case in cases:
                self.say(
                    f"round {number}/{self.plan.rounds}: {case.batch} x {case.prompt_len} tokens, {case.steps} steps"
                )
                self.take_turns(case, samples[case])
        return samples

    def take_turns(self, case: Case, samples: Samples) -> None:
        """shoal, then each peer."""
        prompts = random_ids(case.batch, case.prompt_len, self.vocab_size, self.plan.seed)
        turn = {"prompts": prompts, "steps": case.steps}
        samples.shoal.append(self.load.watch(self.shoal, turn))
        for peer in list(self.peers):
            try:
                self.take_turns_of(peer, turn, samples)
            except EngineError as error:
                del self.peers[peer]
                self.leave_out(peer, error)

    def take_turns_of(self, peer: Peer, turn: Turn, samples: Samples) -> None:
        """One peer with each of its settings that may yet be its best."""
        taken = samples.peers[peer.name]
        dropped = _too_slow(taken)
        for name, setting in peer.settings(len(turn["prompts"])):
            if name not in dropped:
                answer = self.load.watch(self.peers[peer], {**turn, **setting})
                taken[name].append(answer)

    def leave_out(self, peer: Peer, error: EngineError) -> None:
        """Remember why."""
        self.not_run[peer.name] = str(error)
        self.say(str(error))


def _too_slow(taken: Mapping[str, Sequence[Answer]]) -> set[str]:
    """The settings that were far from the best of the first round in each phase."""
    first = {name: turns[0] for name, turns in taken.items()}
    close = set()
    for key in ("prefill_seconds", "decode_seconds"):
        best = min((turn[key] for turn in first.values()), default=0.0)
        close |= {name for name, turn in first.items() if turn[key] <= _CLOSE * best}
    return first.keys() - close


def _shoal_command(plan: Plan) -> list[str]:
    settings = {
        "model": str(plan.model),
        "threads": plan.threads,
        "device": plan.device,
        "max_num_seqs": plan.sequences,
        "max_num_batched_tokens": ROWS_PER_STEP,
        "max_model_len": plan.context,
        "skip_tokenizer_init": plan.skip_tokenizer_init,
    }
    return [sys.executable, "-m", "shoal.bench.shoal_worker", json.dumps(settings)]


def _peer_command(plan: Plan, peer: Peer) -> list[str]:
    settings = {"model": str(plan.model), "threads": plan.threads}
    return peer.command(plan.pythons[peer], settings | {"sequences": plan.sequences, "context": plan.context})
