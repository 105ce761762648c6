"""The file of a draft model: found, opened, and refused where what it guesses could be no token of the model that it guesses for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from shoal import hub
from shoal.engine.memory_plan import DraftSize, draft_home
from shoal.errors import ParameterError
from shoal.gguf.reader import GGUFFile, StringArray
from shoal.kernels.base import Backend
from shoal.models.config import ModelConfig
from shoal.models.weights import Model, load_model
from shoal.params import EngineConfig, SpeculativeConfig
from shoal.text.vocab import special_id

_FIELD = "speculative_config.model"
_KEY = "tokenizer.ggml."


class DraftFile(NamedTuple):
    """An open file, and what model is in it."""

    file: GGUFFile
    model: ModelConfig

    @property
    def weights_bytes(self) -> int:
        """Of all weights, as the file has them."""
        return sum(info.nbytes for info in self.file.tensors.values())

    @property
    def size(self) -> DraftSize:
        """For the memory plan."""
        return DraftSize(self.model, self.weights_bytes)

    def load(self, backend: Backend, max_model_len: int) -> Model:
        """Its network, on what computes it beside a model on ``backend`` whose sequences have ``max_model_len`` tokens at most. Raises
        as ``load_model``."""
        longest = min(max_model_len, self.model.context_length)
        model = load_model(self.file, draft_home(backend), max_model_len=longest)
        assert isinstance(model, Model), "encoders are refused when the file is opened"
        return model


@contextmanager
def open_draft(target: GGUFFile, config: EngineConfig) -> Iterator[DraftFile | None]:
    """The draft model that ``config`` names, for the model in ``target``; None where it names none, and for an encoder, which has
    nothing to guess.

    Raises ModelNotFoundError or GGUFError where there is no such model, UnsupportedError for one that shoal does not run, and
    ParameterError, which names both files, for an encoder or another vocabulary.
    """
    wanted = config.speculative_config
    path = wanted.model if isinstance(wanted, SpeculativeConfig) else None
    if path is None:
        yield None
        return
    model = ModelConfig.from_gguf(target)
    if model.arch.encoder:
        yield None
        return
    with GGUFFile.open(hub.resolve(path)) as file:
        draft = DraftFile(file, ModelConfig.from_gguf(file))
        if draft.model.arch.encoder:
            _refuse(path, f"no encoder such as {draft.model.architecture}: it continues no text")
        difference = _difference(target, file) or _sizes_differ(model, draft.model)
        if difference is not None:
            _refuse(path, f"a model of the same vocabulary as {target.path}: {difference}")
        yield draft


def _refuse(path: str | Path, allowed: str) -> None:
    raise ParameterError(_FIELD, str(path), allowed)


def _difference(target: GGUFFile, draft: GGUFFile) -> str | None:
    """The first one between two vocabularies: what is there, and what is in the draft model."""
    kinds = [file.get(_KEY + "model", str) for file in (target, draft)]
    if kinds[0] != kinds[1]:
        return f"tokenizer.ggml.model is {kinds[0]!r} there, {kinds[1]!r} in {draft.path}"
    tokens = [file.get(_KEY + "tokens", StringArray).bytes_list() for file in (target, draft)]
    for token, (one, other) in enumerate(zip(*tokens, strict=False)):
        if one != other:
            return f"token {token} is {_shown(one)} there, {_shown(other)} in {draft.path}"
    sizes = [len(texts) for texts in tokens]
    if sizes[0] != sizes[1]:
        return f"there are {sizes[0]} tokens there, {sizes[1]} in {draft.path}"
    for role in ("bos", "eos"):
        ids = [special_id(file, role, sizes[0]) for file in (target, draft)]
        if ids[0] != ids[1]:
            return f"{role} is token {ids[0]} there, {ids[1]} in {draft.path}"
    return None


def _sizes_differ(target: ModelConfig, draft: ModelConfig) -> str | None:
    """Embeddings may have more rows than there are tokens."""
    if target.vocab_size == draft.vocab_size:
        return None
    return f"the embedding has {target.vocab_size} rows there, {draft.vocab_size} in the draft model"


def _shown(token: bytes) -> str:
    return repr(token.decode(errors="replace")[:40])
