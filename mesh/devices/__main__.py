"""`python -m mesh.devices --cache DIR [--device SPEC]... [--reserve F]`: this site's devices, as one line of JSON.

The line is a list of `LocalDevice` documents, or {"error": code, "message": text} with the error's exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import platformdirs

from mesh.devices import cpu
from mesh.devices.cache import SpeedCache, undisturbed
from mesh.devices.calibration import Speed, calibrate
from mesh.devices.discovery import LocalDevice, discover
from mesh.devices.found import Found
from mesh.devices.spec import parse_specs
from mesh.errors import MeshError, WorkerError

#: Longer than the calibrations of a few peers that start together on one machine.
_WAIT_FOR_OTHERS_S = 30.0
#: For how long one peer's measurement serves others that start on the same machine.
_FRESH_S = 600.0


def run(cache_folder: Path, specs: Sequence[str], reserve: float, *, shared_folder: Path) -> list[LocalDevice]:
    """Discover and, where the cache does not know, measure. Raises MeshError.

    `shared_folder` is common to the peers of this machine. Once torch is needed one of them works at a time: loading
    it beside a measurement was seen to halve the figure measured.
    """
    cache = SpeedCache(cache_folder)
    with contextlib.ExitStack() as alone:

        @functools.cache
        def wait_for_others() -> None:
            alone.enter_context(undisturbed(shared_folder / "calibration.lock", _WAIT_FOR_OTHERS_S))

        def load_torch() -> Any:
            wait_for_others()
            return _load_torch()

        def measure(found: Found, threads: int) -> Speed:
            key = f"{found.kind} {found.model} threads={threads} torch={version('torch')}"
            if (known := cache.get(key)) is not None:
                return known
            wait_for_others()
            digest = hashlib.sha256(f"{platform.node()} {key}".encode()).hexdigest()[:16]
            shared = SpeedCache(shared_folder / digest)
            speed = shared.get(key) if 0 <= shared.age_s(time.time()) < _FRESH_S else None
            if speed is None:
                speed = _measured(load_torch, found, threads)
                if speed.steady:
                    shared.put(key, speed)
            if speed.steady and not cache.put(key, speed):
                print(f"{cache.path} cannot be written; the next start measures again", file=sys.stderr)
            return speed

        return discover(parse_specs(specs), cpu=cpu.find(), load_torch=load_torch, measure=measure, reserve=reserve)


def _measured(load_torch: Callable[[], Any], found: Found, threads: int) -> Speed:
    """Measure a device, and what an exchange with another process of this machine takes."""
    from mesh.devices import layers
    from mesh.devices.exchange import Partner

    with Partner() as partner:
        torch = load_torch()
        partner.ready()  # loading beside a measurement would disturb it
        speed = calibrate(
            torch,
            found.torch_device,
            threads=threads,
            dtypes=found.dtypes,
            free_bytes=found.free_bytes,
            # A CPU's only thread: what it waits for the others of a busy machine is not the device's slowness.
            clock=time.thread_time if found.kind == "cpu" and threads == 1 else time.perf_counter,
            layers=layers.decoding,
        )
        decoding = dict(speed.decoding)
        exchange_s = None
        for dtype in decoding if found.kind == "cpu" and threads == 1 else list(decoding)[:1]:
            company = partner.company(torch, dtype)
            if dtype == "float32":
                exchange_s = company.exchange_s
            if found.kind == "cpu" and company.together is not None:
                decoding[dtype] = replace(decoding[dtype], together=company.together)
        if found.kind == "cpu":
            with torch.inference_mode():
                decoding = {
                    dtype: replace(each, waking_s=layers.waking_s(torch, dtype, found.free_bytes))
                    for dtype, each in decoding.items()
                }
        return replace(speed, decoding=decoding, exchange_s=exchange_s)


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
        shared = platformdirs.user_cache_path("isthmus", appauthor=False) / "calibration"
        devices = run(options.cache, options.device, options.reserve, shared_folder=shared)
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
