"""What users should know about their model and their prompts, on its way from the log to where they look."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LOGGERS = ("shoal.requests.prompts", "shoal.text")


@contextmanager
def notices_to(say: Callable[[str], None]) -> Iterator[None]:
    """Let ``say`` hear what is logged of models and prompts in this thread, as long as the context lasts.

    Python's logging hears it too, but no longer writes it to stderr by itself.
    """
    handler = _Notices(say)
    for name in _LOGGERS:
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(handler)


class _Notices(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:
            self._say(record.getMessage())
