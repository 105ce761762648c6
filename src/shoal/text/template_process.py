"""The parent's side of ``shoal.text.sandbox``: templates are rendered in a process that is killed when time is up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

from shoal.errors import TemplateError
from shoal.system.child_process import ChildFailure, ChildProcess


class World(NamedTuple):
    """What a rendering sees besides its variables: the moment that ``strftime_now`` tells, by the clock on the wall of ``now``'s time
    zone, and the seed of all that is random in it."""

    now: datetime
    seed: str


class TemplateProcess(ChildProcess):
    """Renders templates in a process of their own, one at a time. May be used from several threads."""

    def __init__(self, timeout: float) -> None:
        super().__init__("shoal.text.sandbox", timeout)

    def render(self, source: str, variables: Mapping[str, Any], world: World) -> str:
        """The output of template ``source``. Raises TemplateError where it fails, refuses or takes too long."""
        now = world.now.replace(tzinfo=None).isoformat()  # as in transformers, %z and %Z are empty
        request = {"source": source, "variables": variables, "now": now, "seed": world.seed}
        try:
            answer = json.loads(self.ask(json.dumps(request).encode() + b"\n"))
        except ChildFailure as problem:
            raise TemplateError(f"chat template: {problem}") from problem
        if "error" in answer:
            raise TemplateError(f"chat template: {answer['error']}")
        return str(answer["text"])
