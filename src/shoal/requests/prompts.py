"""Prompts: a text, token ids or a conversation -> the token ids that the engine gets."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from shoal.chat.conversation import Conversation, ConversationEncoder
from shoal.chat.reply import ReplyFormat
from shoal.errors import ContextLengthError, ParameterError, RequestError, UnsupportedError
from shoal.gguf.reader import GGUFFile
from shoal.params import EngineConfig, SamplingParams, check_priority
from shoal.text.chat import ChatTemplate
from shoal.text.given import given_message
from shoal.text.tokenizer import Tokenizer

Prompt = str | Mapping[str, Any]  # text, {"prompt": text}, {"prompt_token_ids": [...]} or {"messages": [...]}
Message = Mapping[str, Any]
Priority = int | Sequence[int]  # one for all prompts, or one for each
Params = SamplingParams | Iterable[SamplingParams] | None  # one for all prompts, or one for each

# How a text becomes ids; with their defaults, which are vLLM's and llama.cpp's.
TEXT_OPTIONS: Mapping[str, bool] = MappingProxyType({"add_special_tokens": True, "parse_special": False})

_LOG = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """A prompt as ids, and as text where it was given as text. The rest is a conversation's, as in ``EncodedConversation``."""

    ids: list[int]
    text: str | None
    reply: ReplyFormat | None = None
    constraint: dict[str, Any] | None = None


class PromptEncoder:
    """What turns the prompts of one model into ids. May be used from several threads.

    ``tokenizer`` is None where ``skip_tokenizer_init`` left it out, ``chat_template`` where the model has none. What cannot fit into
    ``max_model_len`` tokens is refused before it is encoded. ``config`` says how conversations are read. The first prompt that does
    not mean what its author seems to think (it spells control tokens and does not parse them, it begins with two BOS) gets a warning
    in the log.
    """

    def __init__(
        self,
        path: Path,
        tokenizer: Tokenizer | None,
        chat_template: ChatTemplate | None,
        max_model_len: int,
        config: EngineConfig | None = None,
    ) -> None:
        config = config or EngineConfig()
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.conversations: ConversationEncoder | None = None
        if tokenizer is not None and chat_template is not None:
            self.conversations = ConversationEncoder(
                chat_template,
                tokenizer,
                tool_call_parser=config.tool_call_parser,
                reasoning_parser=config.reasoning_parser,
                template_kwargs=config.chat_template_kwargs,
            )
        self._path = path
        self._max_model_len = max_model_len
        self._warned = False

    @classmethod
    def from_gguf(cls, file: GGUFFile, config: EngineConfig, max_model_len: int) -> PromptEncoder:
        """The file's tokenizer and chat template, or the template of ``config``. Raises UnsupportedError and GGUFError as these do."""
        path = file.path
        if config.skip_tokenizer_init:
            return cls(path, None, None, max_model_len)
        return cls(path, _tokenizer(file), _chat_template(file, config.chat_template), max_model_len, config)

    def encode(self, prompt: Prompt) -> Encoded:
        """The ids of a prompt. Raises RequestError or TemplateError that say what is wrong with it."""
        if isinstance(prompt, str):
            return Encoded(self._encode_text(prompt), prompt)
        if isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
            return Encoded(token_ids(prompt["prompt_token_ids"]), None)
        if isinstance(prompt, Mapping) and "messages" in prompt:
            return self._encode_chat(Conversation.of(prompt))
        if isinstance(prompt, Mapping) and isinstance(prompt.get("prompt"), str):
            return Encoded(self._encode_text(prompt["prompt"], **_text_options(prompt)), prompt["prompt"])
        expected = 'a text, {"prompt": text}, {"prompt_token_ids": [...]} or {"messages": [...]}'
        raise RequestError(f"the prompt is {type(prompt).__name__} {str(prompt)[:60]!r}, must be {expected}", "prompt")

    def encode_input(self, prompt: Prompt, most: int | None) -> Encoded:
        """The ids of a text to embed, or of ids as they are: the first ``most`` of them, if that is given, special tokens among them.
        Raises as ``encode``."""
        if most is None:
            return self.encode(prompt)
        if isinstance(prompt, str):
            return self._cut_text(prompt, most)
        if isinstance(prompt, Mapping) and isinstance(prompt.get("prompt"), str) and "prompt_token_ids" not in prompt:
            return self._cut_text(prompt["prompt"], most, **_text_options(prompt))
        encoded = self.encode(prompt)
        return encoded._replace(ids=encoded.ids[:most])

    def encode_pair(self, query: str, document: str, most: int | None) -> list[int]:
        """The ids of a query and a document as a ranking model reads them; ``most`` as in ``encode_input``, at the document's cost."""
        tokenizer = self._needed_tokenizer("a text prompt")
        if not query or not document:
            raise RequestError("the query or the document is empty; each needs at least 1 token", "prompt")
        if most is None:
            self._refuse_hopeless(tokenizer, len(query) + len(document))
        ids = tokenizer.encode_pair(query, document)
        if most is None or len(ids) <= most:
            return ids
        end = ids[len(ids) - tokenizer.num_last :]
        return [*ids[: max(0, most - len(end))], *end]

    def close(self) -> None:
        """End the process that renders the template; it starts anew if it is needed again."""
        if self.chat_template is not None:
            self.chat_template.close()

    def _encode_text(self, text: str, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        tokenizer = self._needed_tokenizer("a text prompt")
        if not text:
            raise RequestError("the prompt is empty; it needs at least 1 token", "prompt")
        self._refuse_hopeless(tokenizer, len(text))
        ids = tokenizer.encode(text, add_special_tokens, parse_special)
        if not self._warned:
            self._warn(_two_firsts(tokenizer, ids) or ("" if parse_special else _taken_as_text(tokenizer, text)))
        return ids

    def _cut_text(self, text: str, most: int, add_special_tokens: bool = True, parse_special: bool = False) -> Encoded:
        """The beginning of a text, between what the file puts around it."""
        tokenizer = self._needed_tokenizer("a text prompt")
        if not text:
            raise RequestError("the prompt is empty; it needs at least 1 token", "prompt")
        ids = tokenizer.encode(text, add_special=False, parse_special=parse_special)
        if not add_special_tokens:
            return Encoded(ids[:most], text)
        room = most - len(tokenizer.with_special([]))
        if room < 1:
            reason = f"truncate_prompt_tokens: {most} leaves no room beside special tokens"
            raise RequestError(reason, "truncate_prompt_tokens")
        return Encoded(tokenizer.with_special(ids[:room]), text)

    def _warn(self, problem: str) -> None:
        """Once is enough: it is seldom one prompt alone."""
        if problem:
            self._warned = True
            _LOG.warning("%s (said once)", problem)

    def _encode_chat(self, conversation: Conversation) -> Encoded:
        tokenizer = self._needed_tokenizer("a conversation")
        if self.conversations is None:
            raise RequestError(f"{self._path.name} has no chat template; give one with chat_template", "messages")
        messages = conversation.messages
        if isinstance(messages, (list, tuple)):
            self._refuse_hopeless(tokenizer, sum(map(_content_length, messages)))
            with suppress(RecursionError):  # nested too deeply, which encode refuses
                conversation = replace(conversation, messages=list(map(given_message, messages)))
        ids, reply, constraint = self.conversations.encode(conversation)
        if conversation.add_special_tokens:  # otherwise the template has them
            ids = tokenizer.with_special(ids)
            if not self._warned:
                self._warn(_two_firsts(tokenizer, ids))
        return Encoded(ids, None, reply, constraint)

    def _needed_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f'{what} needs a tokenizer, which skip_tokenizer_init left out; give "prompt_token_ids"')
        return self.tokenizer

    def _refuse_hopeless(self, tokenizer: Tokenizer, num_bytes: int) -> None:
        """Refuse before it is encoded what could not fit if every token were the longest."""
        least, longest = tokenizer.min_tokens_for(num_bytes), self._max_model_len
        if least > longest:
            raise ContextLengthError(
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


def given_template(given: str | Path | None) -> str | None:
    """The text of ``EngineConfig.chat_template``, which may be a path. Raises ParameterError where it is not UTF-8."""
    try:
        return given.read_text(encoding="utf-8") if isinstance(given, Path) else given
    except UnicodeDecodeError as error:
        raise ParameterError(
            "chat_template", str(given), f"a text in UTF-8; at byte {error.start} it is none"
        ) from None


def paired_priorities(count: int, priority: Priority) -> list[int]:
    """A priority for each of ``count`` prompts. Raises ParameterError where the numbers differ, and for one that is no integer."""
    each = list(priority) if isinstance(priority, Sequence) else [priority] * count
    if len(each) != count:
        raise ParameterError("priority", f"{len(each)} items", f"one, or as many as there are prompts ({count})")
    return [check_priority(item) for item in each]


def token_ids(ids: Any) -> list[int]:
    """A list of ids, from a list or an array; 4.0 is 4. Raises RequestError for what is neither."""
    if isinstance(ids, (str, bytes)) or not isinstance(ids, (Sequence, np.ndarray)):
        raise RequestError(f"prompt_token_ids is {type(ids).__name__}, must be a list of integers", "prompt_token_ids")
    return [int(token) if isinstance(token, np.integer) or _is_whole_float(token) else token for token in ids]


def _is_whole_float(value: object) -> bool:
    return isinstance(value, float) and value.is_integer()


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
    """The template that was given, else the file's own, else None."""
    return ChatTemplate.from_gguf(file, given_template(given))


def _text_options(prompt: Mapping[str, Any]) -> dict[str, bool]:
    for name in prompt:
        if name != "prompt" and name not in TEXT_OPTIONS:
            raise RequestError(f"{name!r:.80}: a prompt that is a text has only {', '.join(TEXT_OPTIONS)}", "prompt")
    return {name: _flag(prompt, name, default=default) for name, default in TEXT_OPTIONS.items()}


def _flag(prompt: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = prompt.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{name}: got {value!r:.80}, must be true or false", name)
    return default if value is None else value


def _two_firsts(tokenizer: Tokenizer, ids: list[int]) -> str:
    """What is odd about a prompt that has two BOS; "" where it has not."""
    if not tokenizer.begins_twice(ids):
        return ""
    first = tokenizer.decode(ids[:1])
    return f"a prompt begins with {first!r}, and the special token is added again: leave it out or set add_special_tokens to false"


def _taken_as_text(tokenizer: Tokenizer, text: str) -> str:
    """What is odd about a prompt that spells control tokens and does not parse them; "" where it spells none."""
    spans = tokenizer.control_spans(text)
    if not spans:
        return ""
    start, end = min(spans)
    spelled = text[start:end]
    remedy = "give messages, for the chat template, or set parse_special to true"
    if start == 0 and tokenizer.begins_twice(tokenizer.encode(spelled, parse_special=True)):
        remedy += " and add_special_tokens to false"
    return f"a prompt spells the control token {spelled!r}, which is taken as text: {remedy}"


def _content_length(message: Any) -> int:
    content = message.get("content") if isinstance(message, Mapping) else None
    return len(content) if isinstance(content, str) else 0
