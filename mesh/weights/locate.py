"""Where a model lies at this site, from the name a user or another site calls it by. Asks the disk alone."""

from __future__ import annotations

import re
from pathlib import Path

from mesh.errors import ModelMissing

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def locate(model: str, models: Path | None) -> str:
    """What to open for `model`. Without `models` any path that exists; with it, paths below that folder alone.

    A Hugging Face id that is no such path is left to whoever opens it: the hub's cache may have it. Raises
    ModelMissing, at once, where nothing of that name is here.
    """
    if models is None:
        try:
            if Path(model).expanduser().exists():
                return model
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelMissing(f"no model at {model}: {getattr(error, 'strerror', None) or error}") from error
    else:
        found = _below(model, models)
        if found is not None:
            return str(found)
    if _ID.fullmatch(model) and Path(model).suffix != ".gguf":
        return model
    raise ModelMissing(f"no model at {model}: give a folder, a .gguf file or a Hugging Face id")


def there(path: str) -> bool:
    """Whether a path exists."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def _below(model: str, models: Path) -> Path | None:
    try:
        home = models.resolve()
        path = (home / model).resolve()  # an absolute name stays itself
        return path if path.is_relative_to(home) and path != home and path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None
