"""`python -m mesh.devices --cache DIR [--device SPEC]... [--reserve F]`: this site's devices, as one line of JSON.

The line is a list of `LocalDevice` documents, or {"error": code, "message": text} with the error's exit code.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mesh.devices import cpu
from mesh.devices.cache import SpeedCache, undisturbed
from mesh.devices.calibration import Speed, calibrate
from mesh.devices.discovery import LocalDevice, discover
from mesh.devices.found import Found
from mesh.devices.spec import parse_specs
from mesh.errors import MeshError, WorkerError

#: Longer than the calibrations of a few peers that start together on one machine.
_WAIT_FOR_OTHERS_S = 30.0


def run(cache_folder: Path, specs: Sequence[str], reserve: float) -> list[LocalDevice]:
    """Discover and, where the cache does not know, measure. Raises MeshError."""
    cache = SpeedCache(cache_folder)

    def measure(found: Found, threads: int) -> Speed:
        key = f"{found.kind} {found.model} threads={threads} torch={version('torch')}"
        if (known := cache.get(key)) is not None:
            return known
        torch = _load_torch()
        with undisturbed(_WAIT_FOR_OTHERS_S):
            speed = calibrate(
                torch,
                found.torch_device,
                threads=threads,
                dtypes=found.dtypes,
                free_bytes=found.free_bytes,
                clock=time.perf_counter,
            )
        if speed.steady and not cache.put(key, speed):
            print(f"{cache.path} cannot be written; the next start measures again", file=sys.stderr)
        return speed

    return discover(parse_specs(specs), cpu=cpu.find(), load_torch=_load_torch, measure=measure, reserve=reserve)


def _load_torch() -> Any:
    try:
        import torch
    except (ImportError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise WorkerError(f"torch cannot be loaded: {reason}; install it again") from None
    return torch


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mesh.devices", description="This site's devices, as JSON.")
    parser.add_argument("--cache", type=Path, required=True, help="folder that keeps measured speeds")
    parser.add_argument("--device", action="append", default=[], help="such as cpu,threads=1,memory=200MiB")
    parser.add_argument("--reserve", type=float, default=0.2, help="share of memory kept for the loss of a site")
    options = parser.parse_args(arguments)
    try:
        devices = run(options.cache, options.device, options.reserve)
    except MeshError as error:
        print(json.dumps({"error": error.code, "message": str(error)}))
        return error.exit_code
    print(json.dumps([device.to_dict() for device in devices]))
    return 0


def _end_with_parent(poll_s: float = 0.5) -> None:
    """Exit soon after the daemon that asked is gone: it may have been killed, and nobody reads the answer."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(poll_s)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


if __name__ == "__main__":
    _end_with_parent()
    sys.exit(main())
