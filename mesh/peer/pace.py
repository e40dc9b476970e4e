"""How fast this site's devices decode now, held against what calibration found: what others take of them shows here.

Calibration is a few seconds long and best of its repeats; a device then computes for hours, beside whatever else runs
on the machine. Its workers tell how long their steps took and what those had to do (`mesh.runtime.work`), calibration
tells how long that should have taken (`topology.snapshot.Decoding`), and the quotient is the device's pace: 1.8 is 1.8
times as long. Below 1.5 it is not told: layers that are cut otherwise differ by less, and no plan is to move for noise.

    pace = Pace({"cpu0": {"float32": Decoding(...)}})
    pace.observe("cpu0", "float32", decoded, now)      # what was done since the last report
    pace.told(now)                                     # {"cpu0": 1.8}, or {}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from mesh.runtime.work import Decoded
from topology.snapshot import Decoding

#: What was computed longer ago than this, in seconds of computing, hardly counts: a machine's load changes in minutes.
MEMORY_S: Final = 20.0
#: Nothing is said of a device before it has computed so long: the first steps touch pages and load kernels.
LEAST_S: Final = 1.0
#: Where nothing was decoded for so long, calibration is as good a guess as any.
FORGET_S: Final = 600.0
#: What is told at least, and in which steps: every change is a plan that may move. On a shared host equal runs were
#: measured to differ by a fifth, and shards of one size told 0.7 to 1.4 of another's pace; a neighbour on the same
#: cores doubles what a step takes.
LEAST_TOLD, STEP = 1.5, 0.1
#: A pace beyond this tells of a clock or a worker that is wrong.
MOST_PACE = 20.0


@dataclass(slots=True)
class _Device:
    measured_s: float = 0.0
    expected_s: float = 0.0
    last_s: float = -math.inf
    told: float = 1.0


class Pace:
    """The paces of one site's devices. `decoding` is by device and dtype; a device without it has no pace."""

    def __init__(self, decoding: Mapping[str, Mapping[str, Decoding]]) -> None:
        self._decoding = decoding
        self._devices: dict[str, _Device] = {}

    def observe(self, device: str, dtype: str, done: Decoded, now: float, *, together: bool = False) -> None:
        """Steps that a worker on the device has taken. `together`: another shard of its stage computes at this site."""
        figures = self._decoding.get(device, {}).get(dtype)
        if figures is None or not (0 < done.seconds < math.inf and done.steps > 0):
            return
        expected_s = done.layers * figures.layer_s + done.rows * figures.row_s + done.size_bytes / figures.bandwidth
        expected_s *= figures.together if together else 1.0
        if not 0 < expected_s < math.inf:
            return
        one = self._devices.setdefault(device, _Device())
        kept = math.exp(-done.seconds / MEMORY_S) if now - one.last_s < FORGET_S else 0.0
        one.measured_s = kept * one.measured_s + done.seconds
        one.expected_s = kept * one.expected_s + expected_s
        one.last_s = now

    def told(self, now: float) -> dict[str, float]:
        """The paces worth telling, by device."""
        found = {}
        for name, one in self._devices.items():
            one.told = _told(one, now)
            if one.told != 1.0:
                found[name] = one.told
        return found


def _told(one: _Device, now: float) -> float:
    if now - one.last_s >= FORGET_S or one.measured_s < LEAST_S:
        return 1.0
    pace = min(one.measured_s / one.expected_s, MOST_PACE)
    if abs(pace - one.told) < STEP and one.told != 1.0:
        return one.told
    return 1.0 if pace < LEAST_TOLD else round(pace / STEP) * STEP
