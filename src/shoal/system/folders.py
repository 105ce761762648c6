"""Where shoal keeps things: a folder that the environment names, or one of the user's, for caches or for data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal


def cache_folder(variable: str, name: str) -> Path | None:
    """The folder that the environment's ``variable`` says, else ``name`` in the user's cache folder for shoal.

    None where that user has no home: HOME is not set, and no account has this uid. The folder need not exist.
    """
    return _folder(variable, name, "cache")


def data_folder(variable: str, name: str) -> Path | None:
    """As ``cache_folder``, for what cannot be made again."""
    return _folder(variable, name, "data")


def _folder(variable: str, name: str, kind: Literal["cache", "data"]) -> Path | None:
    chosen = os.environ.get(variable)
    if chosen:
        return Path(os.path.expanduser(chosen)).absolute()
    import platformdirs

    try:
        folder = Path((platformdirs.user_cache_dir if kind == "cache" else platformdirs.user_data_dir)("shoal"))
    except RuntimeError:
        return None
    return folder / name if folder.is_absolute() else None  # older versions leave the ~ as it is


def can_write(folder: Path) -> bool:
    """Whether files can be put into ``folder``, made first if need be; as far as the system says without trying."""
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
