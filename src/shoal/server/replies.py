"""What the small routes answer, and what /tokenize, /detokenize and /apply-template take."""

from __future__ import annotations

from typing import Literal

import msgspec

from shoal.openai.schema import ChatBody

State = Literal["ok", "loading", "draining", "wedged", "failed"]


class Health(msgspec.Struct):
    """How the server is. ``error``: why it failed."""

    status: State
    error: str | msgspec.UnsetType = msgspec.UNSET


class Version(msgspec.Struct):
    """Of shoal."""

    version: str


class ModelMeta(msgspec.Struct):
    """``n_vocab``: as llama-server has it."""

    n_vocab: int


class Model(msgspec.Struct):
    """A name of the model that is served. ``created``: when the server started, in seconds since 1970; ``max_model_len``, in tokens, is
    null while the model is loaded."""

    id: str
    created: int
    root: str
    max_model_len: int | None
    object: Literal["model"] = "model"
    owned_by: Literal["shoal"] = "shoal"
    parent: None = None
    meta: ModelMeta | None = None


class ModelList(msgspec.Struct):
    """All names of the model."""

    data: list[Model]
    object: Literal["list"] = "list"


class Slot(msgspec.Struct):
    """A sequence in the engine. ``rows``: the tokens that the last step computed of it. ``owner``: a digest of its API key."""

    id: str
    state: str
    prompt_tokens: int
    computed_tokens: int
    output_tokens: int
    max_tokens: int | None
    age_seconds: float
    rows: int
    owner: str


class TextToTokenize(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A text as ``prompt``, or as ``content`` (llama.cpp's name, with ``add_special`` and ``with_pieces``)."""

    prompt: str = ""
    content: str = ""
    model: str | None = None
    add_special_tokens: bool = True
    add_special: bool = False
    parse_special: bool = False
    return_token_strs: bool = False
    with_pieces: bool = False


class ConversationToTokenize(ChatBody, kw_only=True, forbid_unknown_fields=True):
    """A chat's body, whose prompt is tokenized."""

    add_special: bool = False
    parse_special: bool = False
    return_token_strs: bool = False
    with_pieces: bool = False


class Tokens(msgspec.Struct):
    """The ids of a text. ``token_strs``: what each stands for, where asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class TokensToDecode(msgspec.Struct, kw_only=True):
    """Token ids."""

    tokens: list[int]
    model: str | None = None


class Decoded(msgspec.Struct):
    """The text of token ids, under vLLM's name and llama.cpp's."""

    prompt: str
    content: str


class Templated(msgspec.Struct):
    """What a conversation becomes, with the control tokens written out."""

    prompt: str
