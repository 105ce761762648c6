"""How the server is set up."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.params import EngineConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """All but what belongs to the engine alone, whose flags are ``engine``.

    ``served``: the names of the model, the first one in answers. ``max_waiting`` requests may wait, with prompts of at most
    ``max_waiting_tokens`` tokens. ``request_timeout`` and ``queue_timeout``: the seconds of each request (None: no limit).
    ``keep_alive``: seconds after which an idle stream gets a comment; ``stall_timeout``: after which a reader that reads nothing is
    given up. ``drain_timeout``: seconds for requests under way at the end. Sizes are in bytes. ``keys_given``: API keys are asked for.
    ``log_prompts``: the access log has the texts of prompts and answers.
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
