"""Ids of files and batches: in the order in which they were made, not to be guessed, and safe as names of files."""

from __future__ import annotations

import re
import secrets
import threading
import time

_TIME_DIGITS, _RANDOM_BYTES = 12, 8
_DIGITS = _TIME_DIGITS + 2 * _RANDOM_BYTES


class IdMaker:
    """Makes ids that begin with ``prefix``; each is greater than all before it and than ``newest``, whatever the clock does."""

    def __init__(self, prefix: str, newest: str = "") -> None:
        self._prefix = prefix
        self._form = re.compile(re.escape(prefix) + f"[0-9a-f]{{{_DIGITS}}}")
        self._lock = threading.Lock()
        self._last = int(newest[len(prefix) :][:_TIME_DIGITS], 16) if self.owns(newest) else 0

    def next(self) -> str:
        """A new id."""
        with self._lock:
            self._last = max(self._last + 1, time.time_ns() // 1_000_000)
            return f"{self._prefix}{self._last:0{_TIME_DIGITS}x}{secrets.token_hex(_RANDOM_BYTES)}"

    def owns(self, text: str) -> bool:
        """Whether ``text`` has the form of its ids. Nothing else may become part of a path."""
        return self._form.fullmatch(text) is not None
