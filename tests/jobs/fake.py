"""An LLM that answers with an echo after as many steps as ``max_tokens`` says, and remembers what it was asked."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from shoal.errors import RequestError
from shoal.llm import LLM, CompletionOutput, RequestOutput
from shoal.params import EngineConfig, SamplingParams


class _Tokenizer:
    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


class FakeLLM:
    """``on_step`` is called at the start of each step. A prompt that starts with "long" is refused, "broken" fails, "slow" takes too
    long if there is a limit, the last of its samples. ``broken`` is what the engine says of itself.

    Unless ``remember``, ``submitted`` (prompt to parameters) stays empty.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int = 4,
        seed: int = 0,
        on_step: Callable[[], None] = lambda: None,
        remember: bool = True,
    ) -> None:
        self.config = EngineConfig(max_num_seqs=max_num_seqs, seed=seed)
        self.tokenizer = _Tokenizer()
        self.submitted: dict[str, SamplingParams] = {}
        self.aborted: list[str] = []
        self.most_running = 0
        self.broken: str | None = None
        self.drafts = (40, 30)  # drafted and accepted tokens
        self._on_step = on_step
        self._remember = remember
        self._left: dict[str, tuple[str, int]] = {}
        self._late: set[str] = set()
        self._samples: dict[str, int] = {}
        self._running = 0  # of those in the last step, how many go on

    @property
    def as_llm(self) -> LLM:
        return cast(LLM, self)

    def stats(self) -> Any:
        waiting = len(self._left) - self._running
        return SimpleNamespace(
            running=self._running,
            waiting=waiting,
            broken=self.broken,
            spec_decode_num_draft_tokens=self.drafts[0],
            spec_decode_num_accepted_tokens=self.drafts[1],
        )

    def submit(
        self, prompt: Any, params: SamplingParams, *, request_id: str, priority: int, timeout: float | None
    ) -> str:
        text = prompt if isinstance(prompt, str) else prompt["messages"][-1]["content"]
        if text.startswith("long"):
            raise RequestError("the prompt has 9 tokens; max_model_len is 8", "prompt_token_ids")
        if self._remember:
            self.submitted[text] = params
        late = timeout is not None and text.startswith("slow")
        self._left[request_id] = (text, 1 if late or text.startswith("broken") else params.max_tokens or 1)
        self._late |= {request_id} if late else set()
        self._samples[request_id] = params.n
        self.most_running = max(self.most_running, len(self._left))
        return request_id

    def step(self) -> list[RequestOutput]:
        self._on_step()
        outputs = []
        for request_id, (text, left) in list(self._left.items())[: self.config.max_num_seqs]:
            self._left[request_id] = (text, left - 1)
            outputs.append(self._output(request_id, text, left - 1))
        self._left = {request_id: item for request_id, item in self._left.items() if item[1] > 0}
        self._running = sum(not output.finished for output in outputs)
        return outputs

    def abort(self, request_id: str) -> bool:
        self.aborted.append(request_id)
        return self._left.pop(request_id, None) is not None

    def _output(self, request_id: str, text: str, left: int) -> RequestOutput:
        if text.startswith("broken"):
            return RequestOutput.failed(request_id, text, "NaN logits")
        ended = "timeout" if request_id in self._late else "length"
        reason = None if left > 0 else ended
        answers = [
            CompletionOutput(index, text.upper(), list(text.encode()), finish_reason=reason and "length")
            for index in range(self._samples[request_id])
        ]
        answers[-1].finish_reason = reason
        return RequestOutput(request_id, text, [1, 2, 3], answers, finished=reason is not None)
