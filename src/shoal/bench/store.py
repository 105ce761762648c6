"""JSON files that are whole at any moment: a new one takes the old one's place at once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from shoal.errors import ParameterError


def read_json(path: Path) -> dict[str, Any]:
    """What ``write_json`` wrote; empty if there is no such file. Raises ParameterError for a file that is something else."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ParameterError("results", str(path), "a JSON object that shoal bench wrote: move this file away")
    return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file, or replace it, so that a reader (or the next run, if this one is killed) sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
