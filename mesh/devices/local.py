"""The daemon's way to its devices: discovery in a process of its own, so that the daemon never loads torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import trio

from mesh.devices.discovery import LocalDevice
from mesh.errors import BY_CODE, DeadlineExceeded, MeshError, WorkerError

__all__ = ["DeviceSettings", "LocalDevice", "discover"]

#: Loading torch from a cold disk takes tens of seconds; measuring takes about two for each device.
_TIMEOUT_S = 120.0


class DeviceSettings(Protocol):
    """The part of a peer's configuration that devices need."""

    @property
    def device(self) -> Sequence[str]: ...
    @property
    def reserve(self) -> float: ...


async def discover(
    config: DeviceSettings,
    data_dir: Path,
    *,
    timeout_s: float = _TIMEOUT_S,
    command: Sequence[str] = (sys.executable, "-m", "mesh.devices"),
) -> list[LocalDevice]:
    """This site's devices, measured or from the cache in `data_dir`; at least one.

    Raises ConfigError for a spec that cannot be met, DeadlineExceeded after `timeout_s`, WorkerError where the process
    fails otherwise. `command` is replaced in tests.
    """
    arguments = ["--cache", str(data_dir), "--reserve", repr(config.reserve)]
    for spec in config.device:
        arguments += ["--device", spec]
    try:
        with trio.fail_after(timeout_s):
            done = await trio.run_process(
                [*command, *arguments], stdin=subprocess.DEVNULL, capture_stdout=True, capture_stderr=True, check=False
            )
    except trio.TooSlowError:
        raise DeadlineExceeded(f"device discovery did not finish within {timeout_s:g} s; see if torch loads") from None
    except OSError as error:
        raise WorkerError(f"device discovery cannot start {command[0]}: {error.strerror or error}") from None
    return _parse(done)


def _parse(done: subprocess.CompletedProcess[bytes]) -> list[LocalDevice]:
    lines = done.stdout.decode("utf-8", "replace").strip().splitlines()
    complaints = done.stderr.decode("utf-8", "replace").strip().splitlines()
    try:
        document: Any = json.loads(lines[-1]) if lines else None
        if isinstance(document, dict):
            raise BY_CODE.get(document["error"], MeshError)(document["message"])
        if done.returncode == 0 and document:
            return [LocalDevice.from_dict(entry) for entry in document]
    except (ValueError, KeyError, TypeError):
        pass  # not what the command prints: told below
    reason = complaints[-1] if complaints else "it printed nothing of use"
    raise WorkerError(f"device discovery failed with status {done.returncode}: {reason}")
