"""What a job is asked to do, and what its answers depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from shoal import hub
from shoal.engine.memory_plan import max_model_len
from shoal.engine.placement import settled
from shoal.errors import ParameterError
from shoal.gguf.reader import GGUFFile
from shoal.jobs.durable.fingerprint import model_fingerprint, printable
from shoal.jobs.durable.manifest import Identity
from shoal.jobs.input.rows import ChatSettings, RowReader
from shoal.jobs.running.files import JobFiles
from shoal.kernels.load import find_device
from shoal.models.config import ModelConfig
from shoal.models.sampling_defaults import sampling_defaults
from shoal.params import EngineConfig, SamplingParams
from shoal.requests.prompts import TEXT_OPTIONS
from shoal.version import __version__


@dataclass(frozen=True, kw_only=True, slots=True)
class JobOptions:
    """How a job is run.

    What decides about answers, and cannot change between the runs of one job: ``served`` (names that rows may call the model),
    ``defaults`` (sampling parameters, ``add_special_tokens`` and ``parse_special`` of rows that do not give them), ``chat`` (a plain
    row's prompt goes through the chat template, after ``system`` if that is given), ``prompt_column`` and ``output_column`` of a table.

    What may change: ``strict`` (refuse an input with a bad row before anything is run), ``restart`` (drop what there is),
    ``retry_errors`` (run failed rows again), ``max_errors`` (stop when more rows have failed), ``deadline`` (seconds from the start
    of the job, or its last retry, after which rows expire), ``timeout`` (seconds for a row).
    """

    served: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    chat: bool = False
    system: str | None = None
    prompt_column: str | None = None
    output_column: str = "output"
    strict: bool = False
    restart: bool = False
    retry_errors: bool = False
    max_errors: int | None = None
    deadline: float | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "defaults", _plain(self.defaults))
        if self.system is not None and not self.chat:
            raise ParameterError("system", self.system, "given with chat")
        if self.chat and self.defaults.get("parse_special"):
            raise ParameterError(
                "parse_special", True, "left out with chat: control tokens spelled in messages are always text"
            )
        for name in ("system", "prompt_column", "output_column", "served"):
            _refuse_unsendable(name, getattr(self, name))
        if self.max_errors is not None and self.max_errors < 0:
            raise ParameterError("max_errors", self.max_errors, "0 or more")
        for name in ("deadline", "timeout"):
            seconds = getattr(self, name)
            if seconds is not None and not 0 < seconds < float("inf"):
                raise ParameterError(name, seconds, "a positive number of seconds")
        if self.restart and self.retry_errors:
            raise ParameterError("retry_errors", True, "left out with restart, which runs all rows again")


@dataclass(frozen=True, slots=True)
class Task:
    """What one run is asked for: ``path`` is the model's file, ``served`` the names that rows may call it. ``begun``: when its job was,
    with the time zone; the date for chat templates that ask for one, so that it is the same for all rows and all runs."""

    path: Path
    served: tuple[str, ...]
    files: JobFiles
    options: JobOptions
    config: EngineConfig
    begun: datetime

    @classmethod
    def of(cls, model: str | Path, files: JobFiles, options: JobOptions, config: EngineConfig) -> Task:
        """Resolves ``model``, downloading it if need be, and what of it a GPU computes. The job is begun now."""
        path = hub.resolve(model)
        with GGUFFile.open(path) as file:
            config = settled(file, config)
        served = options.served or names_of(model, path)
        return cls(path, served, files, options, config, datetime.now().astimezone())

    @property
    def from_stdin(self) -> bool:
        """Whether the input can be read only once."""
        return self.files.input.is_stdin

    def reader(self) -> RowReader:
        """Makes rows of the input's lines."""
        options = self.options
        chat = ChatSettings(options.system) if options.chat else None
        with GGUFFile.open(self.path) as file:
            of_model = sampling_defaults(file)
        return RowReader(self.served, options.defaults, chat, self.begun, chat_defaults=of_model)

    def identity(self) -> Identity:
        """All that the answers depend on."""
        options, config = self.options, self.config
        return Identity(
            input=self.files.input.fingerprint(),
            model=model_fingerprint(self.path),
            parameters={
                "seed": config.seed,
                "served_model_name": list(options.served),
                "defaults": dict(options.defaults),
                "chat": options.chat,
                "system": options.system,
                "chat_template": _template_digest(config),
                "chat_template_kwargs": dict(config.chat_template_kwargs or {}),
                "tool_call_parser": config.tool_call_parser,
                "reasoning_parser": config.reasoning_parser,
                "prompt_column": options.prompt_column,
                "output_column": options.output_column,
                "error_file": self.files.place.error_file,
                **({"pooling_type": config.pooling_type} if config.pooling_type else {}),
            },
            numerics={
                "device": find_device(config.device),
                "kv_cache_dtype": config.kv_cache_dtype,
                "kv_cache_memory": config.kv_cache_memory,  # bounds answers without a limit
                "max_model_len": _longest(self.path, config),
                **({"gpu_layers": config.gpu_layers} if find_device(config.device) == "cuda" else {}),
            },
            shoal=__version__,
        )


def _plain(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of rows as JSON has them. Raises ParameterError for what is wrong in itself."""
    params = SamplingParams(**{name: value for name, value in defaults.items() if name not in TEXT_OPTIONS})
    plain: dict[str, Any] = {}
    for name, value in defaults.items():
        if name in TEXT_OPTIONS and not isinstance(value, bool):
            raise ParameterError(name, value, "true or false")
        given = value if name in TEXT_OPTIONS else getattr(params, name)
        plain[name] = list(given) if isinstance(given, tuple) else given
    return plain


def _refuse_unsendable(field: str, value: str | tuple[str, ...] | None) -> None:
    """Raise ParameterError for a text that cannot be written down: its bytes in the command line were not UTF-8."""
    try:
        "".join(value or ()).encode()
    except UnicodeEncodeError:
        raise ParameterError(field, value, "valid UTF-8") from None


def names_of(model: str | Path, path: Path) -> tuple[str, ...]:
    """What a model is called: the reference as given, its path and file name, and the name in its metadata, if that is text."""
    with GGUFFile.open(path) as file:
        name = file.metadata.get("general.name")
    own = [name] if isinstance(name, str) and name else []
    return tuple(dict.fromkeys((*map(printable, (model, path, path.name)), *own)))


def _template_digest(config: EngineConfig) -> str | None:
    """Of the chat template that was given in place of the model's."""
    given = config.chat_template
    if given is None:
        return None
    source = given.read_bytes() if isinstance(given, Path) else given.encode()
    return hashlib.blake2b(source, digest_size=16).hexdigest()


def _longest(path: Path, config: EngineConfig) -> int:
    with GGUFFile.open(path) as file:
        return max_model_len(ModelConfig.from_gguf(file), config)
