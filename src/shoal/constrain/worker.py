"""The process that tries specifications out: one request a line on stdin, one answer a line on stdout.

A small grammar may take for ever to compile, or memory without end, and a chain of thousands of rules overflows the stack of
whoever follows it. No limit of llguidance bounds all of that, so it is bounded from outside: the parent kills this process when
time is up, and the system refuses it memory. Its stack is smaller than any that the parent compiles on.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from typing import Any

from llguidance import LLTokenizer

from shoal.constrain.grammar import GrammarError, Spec, compiled
from shoal.constrain.vocabulary import Vocabulary

MAX_MEMORY = 2 << 30  # bytes of address space
_STACK = 1 << 20  # bytes


def main() -> None:
    """Take in the vocabulary, then answer ``{"kind", "text", "options"}`` with ``{}`` or ``{"error"}`` until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    _limit_memory()
    tokenizer = Vocabulary.unpacked(json.loads(sys.stdin.buffer.readline())).plain_tokenizer()
    _send("ready")
    threading.stack_size(_STACK)
    answering = threading.Thread(target=_answer_all, args=(tokenizer,))
    answering.start()
    answering.join()


def _answer_all(tokenizer: LLTokenizer) -> None:
    for line in sys.stdin.buffer:
        _send(_answer(json.loads(line), tokenizer))


def _answer(request: dict[str, Any], tokenizer: LLTokenizer) -> dict[str, str]:
    try:
        compiled(Spec(**request), tokenizer)
    except GrammarError as error:
        return {"error": str(error)}
    except Exception as error:  # whatever a grammar makes llguidance raise is that grammar's failure
        return {"error": f"{type(error).__name__}: {error}"}
    return {}


def _send(answer: object) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


def _limit_memory() -> None:
    """Where the system has such a limit; the parent's clock works everywhere."""
    if sys.platform == "win32":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))


if __name__ == "__main__":
    main()
