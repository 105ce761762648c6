"""An LLM that answers with an echo after as many steps as ``max_tokens`` says, and remembers what it was asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from shoal.errors import RequestError
from shoal.llm import LLM, CompletionOutput, RequestOutput
from shoal.params import EngineConfig, SamplingParams


class _Tokenizer:
    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


class FakeLLM:
    """``on_step`` is called at the start of each step. A prompt that starts with "long" is refused, "broken" fails.

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
        self._on_step = on_step
        self._remember = remember
        self._left: dict[str, tuple[str, int]] = {}

    @property
    def as_llm(self) -> LLM:
        return cast(LLM, self)

    def submit(self, prompt: Any, params: SamplingParams, *, request_id: str) -> str:
        text = prompt if isinstance(prompt, str) else prompt["messages"][-1]["content"]
        if text.startswith("long"):
            raise RequestError("the prompt has 9 tokens; max_model_len is 8", "prompt_token_ids")
        if self._remember:
            self.submitted[text] = params
        self._left[request_id] = (text, 1 if text.startswith("broken") else params.max_tokens or 1)
        self.most_running = max(self.most_running, len(self._left))
        return request_id

    def step(self) -> list[RequestOutput]:
        self._on_step()
        self._left = {request_id: (text, left - 1) for request_id, (text, left) in self._left.items()}
        outputs = [_output(request_id, text, left) for request_id, (text, left) in self._left.items()]
        self._left = {request_id: item for request_id, item in self._left.items() if item[1] > 0}
        return outputs

    def abort(self, request_id: str) -> bool:
        self.aborted.append(request_id)
        return self._left.pop(request_id, None) is not None


def _output(request_id: str, text: str, left: int) -> RequestOutput:
    if text.startswith("broken"):
        return RequestOutput.failed(request_id, text, "NaN logits")
    reason = None if left > 0 else "length"
    answer = CompletionOutput(0, text.upper(), list(text.encode()), finish_reason=reason)
    return RequestOutput(request_id, text, [1, 2, 3], [answer], finished=reason is not None)
