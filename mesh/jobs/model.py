"""What the owner of a job must know of its model, found out by a subprocess so that the daemon never imports torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from mesh.errors import BY_CODE, DeadlineExceeded, ModelError
from topology.model import ModelSpec

#: Importing transformers takes up to ten seconds on a cold disk; a hub that does not answer is given up within this.
INSPECT_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model's shape, the folder of its tokenizer, the token ids that end a text, and what workers here open.

    `path` differs from the model's name for a GGUF file: a folder in the cache that has its settings beside it, so that
    no worker has to import transformers to read them.
    """

    spec: ModelSpec
    tokenizer: Path
    eos: frozenset[int]
    path: str = ""


class Inspector(Protocol):
    """Finds out about a model. Injected, so that tests need neither files nor a subprocess."""

    async def __call__(self, model: str) -> ModelInfo:
        """Raises ModelError with one line that says what is wrong with the model."""
        ...


class SubprocessInspector:
    """Runs `python -m mesh.runtime.inspect`, which prints one JSON line."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache

    async def __call__(self, model: str) -> ModelInfo:
        """Inspect `model`; raises ModelError, or DeadlineExceeded after `INSPECT_DEADLINE_S`."""
        # After "--" a name is a name, also where it begins like an option.
        command = [sys.executable, "-m", "mesh.runtime.inspect", "--cache", str(self._cache), "--", model]
        with trio.move_on_after(INSPECT_DEADLINE_S) as scope:
            done = await trio.run_process(
                command, stdin=b"", capture_stdout=True, stderr=subprocess.DEVNULL, check=False
            )
        if scope.cancelled_caught:
            raise DeadlineExceeded(f"reading the model {model!r} took more than {INSPECT_DEADLINE_S:.0f} s")
        return _parse(model, done.stdout.decode(errors="replace"), done.returncode)


def _parse(model: str, output: str, returncode: int) -> ModelInfo:
    lines = output.strip().splitlines()
    try:
        document = json.loads(lines[-1])
    except (IndexError, ValueError):
        raise ModelError(f"the model {model!r} could not be read: the inspector ended with code {returncode}") from None
    if "error" in document:
        raise BY_CODE.get(document["error"], ModelError)(document["message"])
    return ModelInfo(
        ModelSpec.from_dict(document["spec"]),
        Path(document["tokenizer"]),
        frozenset(document["eos"]),
        str(document["path"]),
    )
