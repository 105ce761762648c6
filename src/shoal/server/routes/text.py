"""/tokenize, /detokenize and /apply-template, with the fields of vLLM's and llama.cpp's."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from shoal.errors import ParameterError, RequestError, TemplateError
from shoal.openai.convert import check_model, parse_chat
from shoal.openai.schema import APIError
from shoal.requests.prompts import Prompt
from shoal.server.bodies import json_object, json_response, service_of
from shoal.server.replies import Decoded, Templated, Tokens
from shoal.server.service import Service

_OF_TEXT = {
    "prompt",
    "content",
    "model",
    "add_special_tokens",
    "add_special",
    "parse_special",
    "return_token_strs",
    "with_pieces",
}
_MOST_IDS = 2**20


def routes() -> list[Route]:
    """Those of this file."""
    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/apply-template", apply_template, methods=["POST"]),
    ]


async def tokenize(request: Request) -> Response:
    """The ids of a text (``prompt``, or llama.cpp's ``content``) or of ``messages``."""
    service, body = service_of(request), await json_object(request)
    check_model(body.get("model"), service.settings.served)
    strings = _flag(body, "return_token_strs") or _flag(body, "with_pieces")
    prompt = _conversation(body) if "messages" in body else _text(body)
    ids = await service.in_thread(_encode, service, prompt)
    shown = [_shown(service, token) for token in ids] if strings else None
    return json_response(Tokens(len(ids), service.llm.engine.max_model_len, ids, shown))


async def detokenize(request: Request) -> Response:
    """The text of ``tokens``, as ``prompt`` and as llama.cpp's ``content``."""
    service, body = service_of(request), await json_object(request)
    check_model(body.get("model"), service.settings.served)
    tokens, most = body.get("tokens"), service.tokenizer.vocab_size
    if not isinstance(tokens, list) or len(tokens) > _MOST_IDS:
        raise APIError(f"tokens: must be a list of at most {_MOST_IDS} token ids", "tokens")
    for token in tokens:
        if type(token) is not int or not 0 <= token < most:
            raise APIError(f"tokens: {str(token)[:40]} is no token id; the vocabulary ends at {most - 1}", "tokens")
    text = await service.in_thread(service.tokenizer.decode, tokens)
    return json_response(Decoded(text, text))


async def apply_template(request: Request) -> Response:
    """The text that ``messages`` become, with the control tokens written out."""
    service, body = service_of(request), await json_object(request)
    ids = await service.in_thread(_encode, service, _conversation(body))
    return json_response(Templated(await service.in_thread(service.tokenizer.decode, ids)))


def _conversation(body: dict[str, Any]) -> Prompt:
    """A chat's body; flags of ``/tokenize`` are not its own."""
    own = {name: value for name, value in body.items() if name not in _OF_TEXT - {"model"}}
    return parse_chat(own).prompt


def _text(body: dict[str, Any]) -> Prompt:
    for name in body:
        if name not in _OF_TEXT:
            raise APIError(f"{name}: no such field", name)
    name = "content" if "content" in body else "prompt"
    text = body.get(name)
    if not isinstance(text, str):
        raise APIError(f"{name}: must be a text", name)
    special = _flag(body, "add_special_tokens", name != "content") or _flag(body, "add_special")
    return {"prompt": text, "add_special_tokens": special, "parse_special": _flag(body, "parse_special")}


def _flag(body: dict[str, Any], name: str, default: bool = False) -> bool:
    value = body.get(name, default)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise APIError(f"{name}: must be true or false", name)
    return value


def _encode(service: Service, prompt: Prompt) -> list[int]:
    try:
        return service.llm.encode(prompt)
    except (RequestError, ParameterError, TemplateError) as error:
        raise APIError(str(error), getattr(error, "field", None)) from None


def _shown(service: Service, token: int) -> str:
    return service.tokenizer.token_bytes(token).decode("utf-8", "replace")
