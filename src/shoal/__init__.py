"""shoal: many language-model requests at once, directly on quantised GGUF files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shoal.version import __version__ as __version__

if TYPE_CHECKING:
    from shoal import jobs
    from shoal.errors import ShoalError
    from shoal.llm import LLM, CompletionOutput, RequestOutput
    from shoal.params import BeamSearchParams, EngineConfig, PoolingParams, SamplingParams, StructuredOutputsParams
    from shoal.requests.pooled import EmbeddingRequestOutput, ScoringRequestOutput
    from shoal.text.tokenizer import Tokenizer


__all__ = [
    "LLM",
    "BeamSearchParams",
    "CompletionOutput",
    "EmbeddingRequestOutput",
    "EngineConfig",
    "PoolingParams",
    "RequestOutput",
    "SamplingParams",
    "ScoringRequestOutput",
    "ShoalError",
    "StructuredOutputsParams",
    "Tokenizer",
    "jobs",
]

_HOME = {
    "LLM": "shoal.llm",
    "BeamSearchParams": "shoal.params",
    "CompletionOutput": "shoal.llm",
    "EmbeddingRequestOutput": "shoal.requests.pooled",
    "EngineConfig": "shoal.params",
    "PoolingParams": "shoal.params",
    "RequestOutput": "shoal.llm",
    "SamplingParams": "shoal.params",
    "ScoringRequestOutput": "shoal.requests.pooled",
    "ShoalError": "shoal.errors",
    "StructuredOutputsParams": "shoal.params",
    "Tokenizer": "shoal.text.tokenizer",
    "jobs": "shoal",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import shoal` alone stays under 100 ms."""
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    import importlib

    if home == __name__:
        return importlib.import_module(f"{home}.{name}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
