"""The parent's side of ``shoal.text.sandbox``: templates are rendered in a process that is killed when time is up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from shoal.child_process import ChildFailure, ChildProcess
from shoal.errors import TemplateError


class TemplateProcess(ChildProcess):
    """Renders templates in a process of their own, one at a time. May be used from several threads."""

    def __init__(self, timeout: float) -> None:
        super().__init__("shoal.text.sandbox", timeout)

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """The output of template ``source``. Raises TemplateError where it fails, refuses or takes too long."""
        request = json.dumps({"source": source, "variables": variables}).encode() + b"\n"
        try:
            answer = json.loads(self.ask(request))
        except ChildFailure as problem:
            raise TemplateError(f"chat template: {problem}") from problem
        if "error" in answer:
            raise TemplateError(f"chat template: {answer['error']}")
        return str(answer["text"])
