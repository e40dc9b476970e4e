"""serf's coordinates, written from its documented constants, to compare ours with. Never used by a peer.

Vivaldi with height in 8 dimensions: every probe is filtered by the median of three per peer, moves the point by one
spring weighted by both errors, is pulled to the origin by gravity, and moves an adjustment that is half the mean
residual of the last twenty probes (serf's coordinate package; Ledlie et al., NSDI 2007).
"""

from __future__ import annotations

import math
import random
from collections import deque
from statistics import median
from typing import NamedTuple

DIMENSIONS, MAX_ERROR, ERROR_GAIN, FORCE_GAIN = 8, 1.5, 0.25, 0.25
ADJUSTMENT_WINDOW, FILTER, GRAVITY_S, MIN_HEIGHT_S, ZERO_S = 20, 3, 150.0, 1e-5, 1e-6


class SerfCoordinate(NamedTuple):
    """A place and a height in seconds, the error, and the adjustment in seconds."""

    place: tuple[float, ...]
    height_s: float
    error: float
    adjustment_s: float

    def raw_s(self, other: SerfCoordinate) -> float:
        """Distance plus heights."""
        return math.dist(self.place, other.place) + self.height_s + other.height_s

    def estimate_s(self, other: SerfCoordinate) -> float:
        """The round trip, adjusted where that leaves it positive."""
        raw_s = self.raw_s(other)
        adjusted_s = raw_s + self.adjustment_s + other.adjustment_s
        return adjusted_s if adjusted_s > 0 else raw_s


class SerfCoordinates:
    """One site's coordinate by serf's rules."""

    def __init__(self, rng: random.Random) -> None:
        """`rng` breaks ties between sites in one place."""
        self._rng = rng
        self._own = SerfCoordinate((0.0,) * DIMENSIONS, MIN_HEIGHT_S, MAX_ERROR, 0.0)
        self._recent: dict[str, deque[float]] = {}
        self._residuals: deque[float] = deque(maxlen=ADJUSTMENT_WINDOW)

    def own(self) -> SerfCoordinate:
        """Our coordinate now."""
        return self._own

    def observe(self, peer: str, coordinate: SerfCoordinate, rtt_s: float, now: float) -> bool:
        """One probe."""
        recent = self._recent.setdefault(peer, deque(maxlen=FILTER))
        recent.append(rtt_s)
        # serf takes the middle element of the sorted samples, the upper one of two.
        rtt_s = max(sorted(recent)[len(recent) // 2] if len(recent) != FILTER else median(recent), ZERO_S)
        own = self._own
        distance_s = own.raw_s(coordinate)
        wrong = abs(distance_s - rtt_s) / rtt_s
        weight = own.error / max(own.error + coordinate.error, ZERO_S)
        error = min(MAX_ERROR, ERROR_GAIN * weight * wrong + own.error * (1 - ERROR_GAIN * weight))
        own = self._push(own, FORCE_GAIN * weight * (rtt_s - distance_s), coordinate)
        self._residuals.append(rtt_s - own.raw_s(coordinate))
        adjustment_s = sum(self._residuals) / (2 * ADJUSTMENT_WINDOW)
        origin = SerfCoordinate((0.0,) * DIMENSIONS, MIN_HEIGHT_S, MAX_ERROR, 0.0)
        pull = -((own.raw_s(origin) / GRAVITY_S) ** 2)
        own = self._push(own, pull, origin)
        self._own = own._replace(error=error, adjustment_s=adjustment_s)
        return True

    def _push(self, own: SerfCoordinate, force_s: float, other: SerfCoordinate) -> SerfCoordinate:
        away = [a - b for a, b in zip(own.place, other.place, strict=True)]
        length = math.hypot(*away)
        height_s = own.height_s
        if length > ZERO_S:
            height_s = max(MIN_HEIGHT_S, (own.height_s + other.height_s) * force_s / length + own.height_s)
        else:
            away = [self._rng.random() - 0.5 for _ in away]
            length = math.hypot(*away)
        place = tuple(a + force_s * b / length for a, b in zip(own.place, away, strict=True))
        return own._replace(place=place, height_s=height_s)
