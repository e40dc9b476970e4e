"""From what a user calls a model to where it lies. Imports neither torch nor transformers."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mesh.errors import ModelError

#: How long a hub may take to answer before the local cache is all there is.
HUB_DEADLINE_S = 3
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def resolve(name: str) -> Path:
    """The folder or .gguf file that `name` means. Fetches a Hugging Face id where a hub can be reached.

    Raises ModelError, within seconds, where there is no such model.
    """
    try:
        path = Path(name).expanduser()
        is_dir, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # no permission, a name too long, no such home
        raise ModelError(f"no model at {name}: {getattr(error, 'strerror', None) or error}") from error
    if is_dir:
        return path.resolve()
    if is_file:
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is neither a folder nor a .gguf file")
        return path.absolute()
    if _ID.fullmatch(name) and not name.startswith((".", "/", "~")):
        return _hub(name)
    raise ModelError(f"no model at {name}: give a folder, a .gguf file or a Hugging Face id")


def _hub(name: str) -> Path:
    # Both are read when the library is first imported.
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(HUB_DEADLINE_S))
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from huggingface_hub import constants, snapshot_download

    try:
        cached = Path(snapshot_download(name, allow_patterns=_PATTERNS, local_files_only=True))
    except Exception:
        cached = None
    if cached is not None and (cached / "config.json").is_file() and any(cached.glob("*.safetensors")):
        return cached.resolve()
    if constants.is_offline_mode() if hasattr(constants, "is_offline_mode") else constants.HF_HUB_OFFLINE:
        raise ModelError(f"model {name} is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it")
    if not _answers(constants.ENDPOINT):
        raise ModelError(
            f"model {name} is neither a path nor in the local cache, and {constants.ENDPOINT} does not answer"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=_PATTERNS)).resolve()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"model {name} cannot be fetched from {constants.ENDPOINT}: {reason}") from error


def _answers(endpoint: str) -> bool:
    """Whether the hub says anything within the deadline: the library itself would retry for a minute."""
    import httpx

    try:
        httpx.head(endpoint, timeout=HUB_DEADLINE_S)
    except httpx.HTTPError:
        return False
    return True
