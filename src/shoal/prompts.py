"""Prompts: a text, token ids or a conversation -> the token ids that the engine gets."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shoal.errors import ParameterError, RequestError, UnsupportedError
from shoal.gguf.reader import GGUFFile
from shoal.params import EngineConfig, SamplingParams, check_priority
from shoal.text.chat import ChatTemplate
from shoal.text.tokenizer import Tokenizer

Prompt = str | Mapping[str, Any]  # text, {"prompt_token_ids": [...]} or {"messages": [...]}
Message = Mapping[str, Any]
Priority = int | Sequence[int]  # one for all prompts, or one for each
Params = SamplingParams | Iterable[SamplingParams] | None  # one for all prompts, or one for each


class Encoded(NamedTuple):
    """A prompt as ids, and as text where it was given as text."""

    ids: list[int]
    text: str | None


class PromptEncoder:
    """What turns the prompts of one model into ids. May be used from several threads.

    ``tokenizer`` is None where ``skip_tokenizer_init`` left it out, ``chat_template`` where the model has none. What cannot fit into
    ``max_model_len`` tokens is refused before it is encoded.
    """

    def __init__(
        self, path: Path, tokenizer: Tokenizer | None, chat_template: ChatTemplate | None, max_model_len: int
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self._path = path
        self._max_model_len = max_model_len

    @classmethod
    def from_gguf(cls, file: GGUFFile, config: EngineConfig, max_model_len: int) -> PromptEncoder:
        """The file's tokenizer and chat template, or the template of ``config``. Raises UnsupportedError and GGUFError as these do."""
        path = file.path
        if config.skip_tokenizer_init:
            return cls(path, None, None, max_model_len)
        return cls(path, _tokenizer(file), _chat_template(file, config.chat_template), max_model_len)

    def encode(self, prompt: Prompt) -> Encoded:
        """The ids of a prompt. Raises RequestError or TemplateError that say what is wrong with it."""
        if isinstance(prompt, str):
            return Encoded(self._encode_text(prompt), prompt)
        if isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
            return Encoded(token_ids(prompt["prompt_token_ids"]), None)
        if isinstance(prompt, Mapping) and "messages" in prompt:
            return Encoded(self._encode_chat(prompt["messages"], prompt.get("chat_template_kwargs") or {}), None)
        expected = 'a text, {"prompt_token_ids": [...]} or {"messages": [...]}'
        raise RequestError(f"the prompt is {type(prompt).__name__} {str(prompt)[:60]!r}, must be {expected}", "prompt")

    def close(self) -> None:
        """End the process that renders the template; it starts anew if it is needed again."""
        if self.chat_template is not None:
            self.chat_template.close()

    def _encode_text(self, text: str) -> list[int]:
        tokenizer = self._needed_tokenizer("a text prompt")
        if not text:
            raise RequestError("the prompt is empty; it needs at least 1 token", "prompt")
        self._refuse_hopeless(tokenizer, len(text))
        return tokenizer.encode(text)

    def _encode_chat(self, messages: Sequence[Message], options: Mapping[str, Any]) -> list[int]:
        tokenizer = self._needed_tokenizer("a conversation")
        if self.chat_template is None:
            raise RequestError(f"{self._path.name} has no chat template; give one with chat_template", "messages")
        self._refuse_hopeless(tokenizer, sum(_content_length(message) for message in messages))
        return self.chat_template.encode(tokenizer, messages, **options)

    def _needed_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f'{what} needs a tokenizer, which skip_tokenizer_init left out; give "prompt_token_ids"')
        return self.tokenizer

    def _refuse_hopeless(self, tokenizer: Tokenizer, num_bytes: int) -> None:
        """Refuse before it is encoded what could not fit if every token were the longest."""
        least, longest = tokenizer.min_tokens_for(num_bytes), self._max_model_len
        if least > longest:
            raise RequestError(
                f"the prompt of {num_bytes} characters is at least {least} tokens; max_model_len is {longest}", "prompt"
            )


def paired(prompts: Prompt | Sequence[Prompt], params: Params) -> list[tuple[Prompt, SamplingParams]]:
    """Each prompt with its parameters. Raises RequestError for no prompts, ParameterError where the numbers differ."""
    many = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
    if not many:
        raise RequestError("the batch is empty; it needs at least 1 prompt", "prompts")
    if params is None or isinstance(params, SamplingParams):
        each = [params or SamplingParams()] * len(many)
    else:
        each = list(params)
    if len(each) != len(many):
        raise ParameterError(
            "sampling_params", f"{len(each)} items", f"one, or as many as there are prompts ({len(many)})"
        )
    return list(zip(many, map(_checked, each), strict=True))


def paired_lazily(prompts: Iterator[Prompt], params: Params) -> Iterator[tuple[Prompt, SamplingParams]]:
    """As ``paired``, but each only when it is asked for."""
    if params is None or isinstance(params, SamplingParams):
        params = itertools.repeat(params or SamplingParams())
    each = iter(params)
    for number, prompt in enumerate(prompts):
        item = next(each, None)
        if item is None:
            raise ParameterError("sampling_params", f"{number} items", "one, or as many as there are prompts")
        yield prompt, _checked(item)


def paired_priorities(count: int, priority: Priority) -> list[int]:
    """A priority for each of ``count`` prompts. Raises ParameterError where the numbers differ, and for one that is no integer."""
    each = list(priority) if isinstance(priority, Sequence) else [priority] * count
    if len(each) != count:
        raise ParameterError("priority", f"{len(each)} items", f"one, or as many as there are prompts ({count})")
    return [check_priority(item) for item in each]


def token_ids(ids: Any) -> list[int]:
    """A list of ids, from a list or an array. Raises RequestError for anything else."""
    if isinstance(ids, (str, bytes)) or not isinstance(ids, (Sequence, np.ndarray)):
        raise RequestError(f"prompt_token_ids is {type(ids).__name__}, must be a list of integers", "prompt_token_ids")
    return [int(token) if isinstance(token, np.integer) else token for token in ids]


def _checked(params: Any) -> SamplingParams:
    if not isinstance(params, SamplingParams):
        raise ParameterError("sampling_params", params, "SamplingParams")
    return params


def _tokenizer(file: GGUFFile) -> Tokenizer:
    try:
        return Tokenizer.from_gguf(file)
    except UnsupportedError as error:
        raise UnsupportedError(f"{error}; skip_tokenizer_init=True runs the model on token ids alone") from error


def _chat_template(file: GGUFFile, given: str | Path | None) -> ChatTemplate | None:
    """The template that was given (a path, or the text itself), else the file's own, else None."""
    try:
        source = given.read_text(encoding="utf-8") if isinstance(given, Path) else given
    except UnicodeDecodeError as error:
        raise ParameterError(
            "chat_template", str(given), f"a text in UTF-8; at byte {error.start} it is none"
        ) from None
    return ChatTemplate.from_gguf(file, source)


def _content_length(message: Any) -> int:
    content = message.get("content") if isinstance(message, Mapping) else None
    return len(content) if isinstance(content, str) else 0
