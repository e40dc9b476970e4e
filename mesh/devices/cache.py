"""Measured speeds kept in the data directory, so that only a first start takes the time to measure.

A file that cannot be read, or holds anything but speeds within bounds, counts as empty and is written anew. A disk that
cannot take the file costs a measurement at the next start and nothing else. Peers that start together on one machine
measure one after the other, and the later ones take what the first has just measured: see `undisturbed`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mesh.devices.calibration import Speed
from mesh.peer.datadir import write_atomically
from topology.picture import MAX_TOGETHER
from topology.snapshot import Decoding

FILE_NAME = "calibration.json"
#: Raised whenever the way of measuring changes, so that old figures are measured again.
_FORMAT = 4
_BOUNDS = (1e3, 1e18)
_MOST_S = 1.0
_MOST_ENTRIES = 64


class SpeedCache:
    """Speeds by device identity (hardware, threads, torch version), in one JSON file of a folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME

    def get(self, key: str) -> Speed | None:
        """What was measured under this key, or None."""
        return self._read().get(key)

    def put(self, key: str, speed: Speed) -> bool:
        """Keep a speed. Gives False, and keeps nothing, where the disk cannot take it."""
        entries = self._read()
        entries.pop(key, None)
        newest = dict([*entries.items(), (key, speed)][-_MOST_ENTRIES:])
        document = {
            "format": _FORMAT,
            "speeds": {
                name: {key: value for key, value in asdict(entry).items() if key != "steady"}
                for name, entry in newest.items()
            },
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(document, indent=1).encode())
        except OSError:
            return False
        return True

    def age_s(self, now_s: float) -> float:
        """Seconds since the file was written, infinite where there is none. `now_s` is the wall clock."""
        try:
            return now_s - self.path.stat().st_mtime
        except OSError:
            return math.inf

    def _read(self) -> dict[str, Speed]:
        try:
            document = json.loads(self.path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            return {}
        speeds = document.get("speeds")
        if not isinstance(speeds, dict):
            return {}
        return {key: speed for key, entry in speeds.items() if (speed := _checked(entry)) is not None}


def _checked(entry: Any) -> Speed | None:
    """A speed, if the entry is one and every figure is within bounds."""
    if not isinstance(entry, dict) or not isinstance(entry.get("flops"), dict):
        return None
    flops, bandwidth = entry["flops"], entry.get("memory_bandwidth")
    if "float32" not in flops or not all(map(_sane, (*flops.values(), bandwidth))):
        return None
    try:
        decoding = {str(dtype): Decoding(**figures) for dtype, figures in entry["decoding"].items()}
    except (KeyError, TypeError, AttributeError):
        return None
    exchange_s = entry.get("exchange_s")
    times = [
        exchange_s or 0.0,
        *(time for each in decoding.values() for time in (each.layer_s, each.row_s, each.waking_s)),
    ]
    if not all(map(_brief, times)) or not all(_sane(each.bandwidth) for each in decoding.values()):
        return None
    if not all(_sane(each.together, (1.0, MAX_TOGETHER)) for each in decoding.values()):
        return None
    return Speed(
        {name: float(figure) for name, figure in flops.items()},
        float(bandwidth or 0.0),
        decoding=decoding,
        exchange_s=exchange_s,
    )


def _brief(seconds: Any) -> bool:
    return isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds <= _MOST_S


def _sane(figure: Any, bounds: tuple[float, float] = _BOUNDS) -> bool:
    if isinstance(figure, bool) or not isinstance(figure, int | float):
        return False
    return math.isfinite(figure) and bounds[0] <= figure <= bounds[1]


@contextlib.contextmanager
def undisturbed(
    path: Path,
    timeout_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[bool]:
    """Hold the right to measure on this machine, by a lock on `path`, so that peers do not measure each other.

    Gives True when held; False after `timeout_s`, or where there is nowhere to keep the lock: then measure anyway.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        yield False
        return
    try:
        end = clock() + timeout_s
        held = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if clock() >= end:
                    break
                sleep(0.05)
            except OSError:  # a file system without locks
                break
            else:
                held = True
                break
        yield held
    finally:
        os.close(descriptor)
