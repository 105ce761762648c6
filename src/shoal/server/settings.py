"""How the server is set up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shoal.errors import ParameterError
from shoal.gguf.reader import GGUFFile
from shoal.params import EngineConfig

_SECONDS = ("request_timeout", "queue_timeout", "keep_alive", "stall_timeout", "drain_timeout")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """All but what belongs to the engine alone, whose flags are ``engine``.

    ``served``: the names of the model, the first one in answers. ``max_waiting`` requests may wait, with prompts of at most
    ``max_waiting_tokens`` tokens. ``request_timeout`` and ``queue_timeout``: the seconds of each request (None: no limit).
    ``keep_alive``: seconds after which an idle stream gets a comment; ``stall_timeout``: after which a reader that reads nothing is
    given up. ``drain_timeout``: seconds for requests under way at the end. Sizes are in bytes. ``keys_given``: API keys are asked for.
    ``log_prompts``: the access log has the texts of prompts and answers. Raises ParameterError.
    """

    engine: EngineConfig
    served: tuple[str, ...]
    max_waiting: int = 1024
    max_waiting_tokens: int = 4_000_000
    request_timeout: float | None = None
    queue_timeout: float | None = None
    isolate_prefix_cache: bool = False
    keys_given: bool = False
    keep_alive: float = 15.0
    stall_timeout: float = 30.0
    drain_timeout: float = 30.0
    max_body: int = 2 * 1024 * 1024
    max_file_size: int = 1024 * 1024 * 1024
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("max_waiting", "max_waiting_tokens"):
            if getattr(self, name) < 0:
                raise ParameterError(name, getattr(self, name), "0 or more")
        for name in _SECONDS:
            seconds = getattr(self, name)
            if seconds is not None and not 0 < seconds < float("inf"):
                raise ParameterError(name, seconds, "a positive number of seconds")


def served_names(model: str, path: Path) -> tuple[str, ...]:
    """What requests may call ``model``, whose file is ``path``, where nobody says. Where it lies is nobody's business but the
    server's. Raises GGUFError."""
    with GGUFFile.open(path) as file:
        name = file.metadata.get("general.name")
    given = (
        model if (model != str(path) and "/" not in model.removeprefix("hf:")) or model.startswith("hf:") else path.name
    )
    names = (given, path.name, *([name] if isinstance(name, str) and name else []))
    return tuple(dict.fromkeys(name.encode("utf-8", "backslashreplace").decode() for name in names))
