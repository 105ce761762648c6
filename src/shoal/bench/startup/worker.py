"""One start of shoal, stage by stage, up to the first token: a process for ``shoal bench startup``.

    python -P worker.py '{"spawned": <time.monotonic() of the caller>, "model": ..., "prompt_len": 16, <engine flags>}'

It says one line of JSON. It is run as a script, so that nothing of shoal is imported before the clock runs.
"""

import time

STARTED = time.monotonic()

import json  # noqa: E402 - what comes before the clock is part of starting Python
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402


class Stages:
    """Seconds of each stage, in the order in which they came."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run``, with what it takes noted under ``name``."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.monotonic()
            try:
                return run(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

        return timed


def main(spawned: float, model: str, prompt_len: int, **flags: Any) -> None:
    """Import, load and answer once."""
    stages = Stages()
    stages.seconds["start Python"] = STARTED - spawned
    stages.time("import shoal", lambda: __import__("shoal"))()
    stages.time("import shoal.llm", lambda: __import__("shoal.llm"))()
    from shoal import llm
    from shoal.requests import prompts

    _time_parts(stages, llm, prompts)
    compiled: list[str] = []
    with llm.LLM(model, on_compile=compiled.append, **flags) as loaded:
        stages.time("first token", first_token)(loaded, prompt_len)
        total = time.monotonic() - spawned
    from shoal.bench.shoal_worker import peak_rss

    print(json.dumps({"stages": stages.seconds, "total": total, "compiled": len(compiled), "peak_rss": peak_rss()}))


def _time_parts(stages: Stages, llm: Any, prompts: Any) -> None:
    """Time the parts that LLM is put together from, where they are called."""
    for module, name, stage in (
        (llm, "open_backend", "import backend, start threads"),
        (prompts, "_tokenizer", "tokenizer"),
        (prompts, "_chat_template", "chat template"),
        (llm, "load_model", "pack weights"),
        (llm, "Engine", "KV cache, bind, compile"),
    ):
        setattr(module, name, stages.time(stage, getattr(module, name)))
    llm.GGUFFile.open = stages.time("open the file", llm.GGUFFile.open)


def first_token(loaded: Any, prompt_len: int) -> None:
    """One greedy token after any prompt of this length."""
    from shoal.params import SamplingParams

    loaded.submit(
        {"prompt_token_ids": [1] * prompt_len}, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=1)
    )
    while loaded.has_work:
        loaded.step()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
