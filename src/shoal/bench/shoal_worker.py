"""shoal's side of ``shoal bench peers``: a process that measures when it is asked to and sleeps otherwise.

    python -m shoal.bench.shoal_worker '{"model": ..., <engine flags>}'

It says one line of JSON when the model is loaded; each line of JSON on stdin is a turn (the arguments of ``measure``), answered
by one line.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from shoal.errors import EngineError
from shoal.llm import LLM
from shoal.params import SamplingParams
from shoal.version import __version__

_GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=None)


def main() -> None:
    """Load the model, then answer turns until stdin ends. Turns repeat prompts, so there is no prefix cache."""
    settings = json.loads(sys.argv[1])
    with LLM(settings.pop("model"), enable_prefix_caching=False, **settings) as llm:
        _say({"version": __version__, "kv_bytes": llm.engine.memory_plan.kv_bytes})
        for line in sys.stdin:
            _say(measure(llm, **json.loads(line)))


def measure(llm: LLM, prompts: list[list[int]], steps: int) -> dict[str, Any]:
    """Seconds until every prompt has its first token, and seconds of the ``steps`` greedy steps after that.

    A sequence that is prefilled early decodes while the others are prefilled; only the steps in which all decode are
    counted as such. Everything between ids in and ids out is in the times. ``step_seconds``: of each of these steps;
    ``cpu_seconds``: of prefill and decode, all threads; ``peak_rss`` in bytes, since the start.
    """
    start, cpu_start = time.perf_counter(), time.process_time()
    waiting = {llm.submit({"prompt_token_ids": prompt}, _GREEDY) for prompt in prompts}
    submitted = list(waiting)
    while waiting:
        waiting -= {output.request_id for output in llm.step() if output.outputs[0].token_ids}
    ends, tokens, cpu_prefilled = [time.perf_counter()], 0, time.process_time()
    for _ in range(steps):
        tokens += len(llm.step())
        ends.append(time.perf_counter())
    cpu_end = time.process_time()
    _drop(llm, submitted)
    if tokens != steps * len(prompts):
        raise EngineError(f"{steps} decode steps of {len(prompts)} sequences gave {tokens} tokens: out of KV pages")
    return {
        "prefill_seconds": ends[0] - start,
        "decode_seconds": ends[-1] - ends[0],
        "step_seconds": [end - before for before, end in pairwise(ends)],
        "cpu_seconds": [cpu_prefilled - cpu_start, cpu_end - cpu_prefilled],
        "peak_rss": peak_rss(),
    }


def _drop(llm: LLM, request_ids: list[str]) -> None:
    for request_id in request_ids:
        llm.abort(request_id)
    while llm.has_work:
        llm.step()


def peak_rss() -> int:
    """Most memory this process has held, in bytes.

    Linux's ``ru_maxrss`` survives exec and so may be the parent's; VmHWM is this program's own.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:"))


def _say(facts: dict[str, Any]) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
