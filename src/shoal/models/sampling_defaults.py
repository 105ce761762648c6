"""How a model wants to be sampled in a chat: the ``general.sampling.*`` keys of its file (llama.cpp's)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from shoal.errors import ParameterError
from shoal.gguf.reader import GGUFFile
from shoal.params import SamplingParams

_PREFIX = "general.sampling."
_INTEGERS = {"top_k": "top_k", "penalty_last_n": "repeat_last_n", "mirostat": "mirostat"}
_NUMBERS = {
    "temp": "temperature",
    "top_p": "top_p",
    "min_p": "min_p",
    "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold",
    "penalty_repeat": "repetition_penalty",
    "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
}


def sampling_defaults(file: GGUFFile) -> dict[str, Any]:
    """Fields of SamplingParams and their values, for chat requests that do not give them.

    Raises GGUFError for a value of the wrong kind or out of range.
    """
    found: dict[str, Any] = {}
    for key, field in {**_INTEGERS, **_NUMBERS, "sequence": "samplers"}.items():
        if _PREFIX + key in file.metadata:
            found[field] = _value(file, key)
            try:
                SamplingParams(**{field: found[field]})
            except ParameterError as error:
                raise file.error(_PREFIX + key, str(error)) from None
    return found


def missing(defaults: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """The defaults of the fields that a request does not give, by either name of a penalty."""
    given = {*given, "repetition_penalty"} if "repeat_penalty" in given else given
    return {name: value for name, value in defaults.items() if name not in given}


def _value(file: GGUFFile, key: str) -> Any:
    if key == "sequence":
        return tuple(name for name in file.get(_PREFIX + key, str).split(";") if name)
    if key in _INTEGERS:
        return file.get(_PREFIX + key, int)
    value = file.metadata[_PREFIX + key]
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return float(str(np.float32(file.get(_PREFIX + key, float))))  # 0.95, not the 0.94999999 that a float32 is
