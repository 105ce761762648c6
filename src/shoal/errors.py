"""Every error that shoal raises on purpose.

    ShoalError
    ├── ParameterError      a request or engine parameter is wrong in itself (also a ValueError)
    ├── RequestError        a request that this model or engine can never serve (empty, of another kind, ...)
    │   └── ContextLengthError   one that is longer than the context or the KV memory
    ├── GGUFError           a file that is not a well-formed GGUF file
    ├── UnsupportedError    a well-formed thing that shoal cannot run (architecture, tensor type, tokenizer)
    ├── ModelNotFoundError  a model reference that leads to no file
    ├── MemoryLimitError    not enough memory, known before anything is allocated
    ├── TemplateError       a chat template that fails or refuses the conversation
    ├── ConstraintError     a grammar that cannot go on: a token it does not allow, or a limit
    ├── JobError            a job that cannot be started, resumed or finished
    ├── NotMeasuredError    a figure that has to be measured on this machine first
    └── EngineError         the engine itself failed; not the fault of one request

A user error is one clear line: it names the field, the value and the limit.
"""

from __future__ import annotations


class ShoalError(Exception):
    """Base of all errors that shoal raises on purpose."""


class ParameterError(ShoalError, ValueError):
    """A parameter that is wrong in itself.

    ``field`` is the parameter's name, ``value`` what was given and ``allowed`` what would be right.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        shown = repr(value)
        if len(shown) > 80:  # both ends: that of a path is its file
            shown = f"{shown[:37]}...{shown[-40:]}"
        super().__init__(f"{field}: got {shown}, must be {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed

    def __reduce__(self) -> tuple[type[ParameterError], tuple[str, object, str]]:
        return (type(self), (self.field, self.value, self.allowed))


class RequestError(ShoalError):
    """A request that this model or engine can never serve; ``field`` names the part at fault."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ContextLengthError(RequestError):
    """A request that is longer than the context, or than the KV memory has room for; the message names both lengths."""


class GGUFError(ShoalError):
    """A malformed GGUF file: which field, at which byte offset, and why."""

    def __init__(self, path: object, field: str, offset: int, reason: str) -> None:
        super().__init__(f"{path}: {field} at byte {offset}: {reason}")
        self.path = path
        self.field = field
        self.offset = offset
        self.reason = reason

    def __reduce__(self) -> tuple[type[GGUFError], tuple[object, str, int, str]]:
        return (type(self), (self.path, self.field, self.offset, self.reason))


class UnsupportedError(ShoalError):
    """A well-formed file or request that needs something shoal does not have."""


class ModelNotFoundError(ShoalError):
    """A model reference (path, short name, ``hf:ORG/REPO:QUANT``) that leads to no file."""


class MemoryLimitError(ShoalError):
    """More memory is needed than there is; the message names both."""


class TemplateError(ShoalError):
    """A chat template that fails, refuses the conversation or produces too much."""


class ConstraintError(ShoalError):
    """A constraint that cannot go on while its request runs: a token that it does not allow, or a limit that it breaks."""


class JobError(ShoalError):
    """A batch job that cannot be started, resumed or finished; the message names the file and the way out."""


class NotMeasuredError(ShoalError):
    """A figure that has to be measured on this machine first; the message holds the command that does it."""


class EngineError(ShoalError):
    """The engine failed in a way that is not one request's fault."""
