"""Network coordinates: what a round trip to a site that nobody here has measured should be.

Each site has a point in `DIMENSIONS` Euclidean dimensions and a height, in seconds; the round trip of two sites is
estimated as their distance plus both heights (Vivaldi, Dabek et al., SIGCOMM 2004). Vivaldi moves a point by one spring
a probe and forgets the probe; so it starts slowly, and the last few outliers show. Here a site remembers its last
`MEMORY` peers: the coordinate each had when heard, and the round trip. After a probe it replays them all, in a few
steps of the kind that scaling by majorization takes (SMACOF, de Leeuw 1977): to the weighted mean of the places where
each peer would have it. A mean cannot explode, whatever the peers say.

The weights make the *relative* error small and its outliers cheap: base weight rtt^-1.5, divided by the relative error
(iterated reweighting for a sum of absolute errors); triangles that the network violates then cost little, where squares
would smear them over everybody. Peers heard long ago count less, most of all in the beginning, when they have moved far
since. What a peer says of its own error is not used, so nobody gains weight by boasting. A single peer cannot
outweigh the rest: base weights are capped at `MAX_SHARE` times their median, and a step by the median round trip or,
where that is longer, by the median of how far off the peers are: who is far from where most peers would have it (near
sites that start in random places, say) may go there at once.

Pure: randomness is injected, time is only compared.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

#: serf's choice too. Four lose a tenth of the accuracy on PlanetLab, more than eight gain nothing.
DIMENSIONS: Final = 8
#: Peers remembered. 64 lose 2 % on PlanetLab after 100 probes, and more after 1000.
MEMORY: Final = 128
#: Bounds of what is believed and of what is estimated, in seconds: no path on Earth takes longer and is of use.
MAX_PLACE_S: Final = 8.0
MAX_HEIGHT_S: Final = 8.0
MIN_HEIGHT_S: Final = 1e-5
MAX_RTT_S: Final = 10.0
MAX_ERROR: Final = 1.5
#: Shorter round trips count as this long: below it lies scheduling, not distance.
NOISE_S: Final = 1e-3
#: The relative error up to which a square is taken for an absolute value.
SOFTNESS: Final = 0.1
#: A near peer may weigh so many times as much as the median one.
MAX_SHARE: Final = 30.0
#: Steps of a replay: a third gains nothing on PlanetLab. A settled site replays every fourth probe; where sites settle
#: after 96 probes instead of 256, the median error after 200 is 5.9 % instead of 5.7.
STEPS: Final = 2
SETTLED_AFTER: Final = 128
SETTLED_EVERY: Final = 4
#: Replays are so far apart at least: a site that joins hears hundreds of answers at once.
REPLAY_GAP_S: Final = 0.2
#: Peers count e-fold less after so many probes: a few at first, in proportion to all that were made later.
FIRST_AGE, AGE_SHARE = 3.0, 0.2
#: Damps the first steps, so that sites that start together do not chase one another.
CAUTION: Final = 4.0

_PACKED = struct.Struct(f">{DIMENSIONS + 2}f")
PACKED_BYTES: Final = _PACKED.size
#: Packed coordinates whose contents are remembered: each is looked at by the decoder and by whoever uses it, and some
#: are published and measured against for minutes.
UNPACKED: Final = 4096
_ONES = np.ones(DIMENSIONS)

_Vector = npt.NDArray[np.float64]


class Gaussian(Protocol):
    """The part of `random.Random` that starts a coordinate."""

    def random(self) -> float:
        """A float in [0, 1)."""
        ...


class Coordinate(NamedTuple):
    """Where a site is. `place` and `height_s` are seconds; `error` is its own relative error, 0 to 1.5."""

    place: tuple[float, ...]
    height_s: float
    error: float = MAX_ERROR

    def sound(self) -> bool:
        """Whether an honest site can have it: the right size, finite, within bounds."""
        return (
            len(self.place) == DIMENSIONS
            and min(self.place) >= -MAX_PLACE_S
            and max(self.place) <= MAX_PLACE_S
            and math.isfinite(sum(self.place))  # minimum and maximum may pass a NaN over
            and 0.0 <= self.height_s <= MAX_HEIGHT_S
            and 0.0 <= self.error <= MAX_ERROR
        )

    def pack(self) -> bytes:
        """`PACKED_BYTES` bytes: big-endian float32, the place, the height, the error."""
        return _PACKED.pack(*self.place, self.height_s, self.error)

    @classmethod
    def unpack(cls, data: bytes) -> Coordinate:
        """The inverse. Raises ValueError for bytes that no honest site sends."""
        if type(data) is not bytes or len(data) != PACKED_BYTES:
            raise ValueError(f"a coordinate is {PACKED_BYTES} bytes")
        return _unpacked(data)


@lru_cache(maxsize=UNPACKED)
def _unpacked(data: bytes) -> Coordinate:
    *place, height_s, error = _PACKED.unpack(data)
    coordinate = Coordinate(tuple(place), height_s, error)
    if not coordinate.sound():
        raise ValueError("a coordinate out of bounds")
    return coordinate


def estimate_s(one: Coordinate, other: Coordinate) -> float:
    """The round trip that two coordinates make likely, in seconds, from 0 to `MAX_RTT_S`."""
    distance_s = math.dist(one.place, other.place) + one.height_s + other.height_s
    return min(max(distance_s, 0.0), MAX_RTT_S) if math.isfinite(distance_s) else MAX_RTT_S


class Coordinates:
    """One site's own coordinate, moved by what its probes measure."""

    def __init__(self, rng: Gaussian) -> None:
        """`rng` chooses the place to start from: sites that all started in one point would not know where to go."""
        self._place: _Vector = np.array([(rng.random() - 0.5) * 0.06 for _ in range(DIMENSIONS)])
        self._height_s = 0.005
        self._error = MAX_ERROR
        self._probes = 0
        self._replayed = 0
        self._replayed_s = -math.inf
        self._peers: dict[str, int] = {}  # peer -> its row
        self._places: _Vector = np.zeros((MEMORY, DIMENSIONS))
        self._heights: _Vector = np.zeros(MEMORY)
        self._rtts: _Vector = np.ones(MEMORY)
        self._when: _Vector = np.zeros(MEMORY)

    @property
    def probes(self) -> int:
        """Probes that have counted."""
        return self._probes

    @property
    def error(self) -> float:
        """The mean relative error over the peers remembered, from 0 to 1.5; 1.5 before the first probe."""
        return self._error

    def own(self) -> Coordinate:
        """Our coordinate now."""
        return Coordinate(tuple(self._place.tolist()), self._height_s, self._error)

    def observe(self, peer: str, coordinate: Coordinate, rtt_s: float, now: float) -> bool:
        """A probe of `peer`, which is at `coordinate`, took `rtt_s`. False if the figures cannot be and were left out.

        `now` only paces the replays. Ages are counted in probes, because sites move by probes.
        """
        if not (math.isfinite(rtt_s) and 0.0 < rtt_s <= MAX_RTT_S and coordinate.sound()):
            return False
        self._probes += 1
        row = self._peers.pop(peer, None)
        if row is None:
            row = len(self._peers) if len(self._peers) < MEMORY else self._peers.pop(next(iter(self._peers)))
            self._rtts[row] = rtt_s
        else:  # queues only add: down at once, up slowly
            self._rtts[row] = min(rtt_s, 0.75 * float(self._rtts[row]) + 0.25 * rtt_s)
        self._peers[peer] = row  # the dict stays in the order of the last probes
        recent = now - self._replayed_s < REPLAY_GAP_S
        self._learn(row, coordinate)
        if not recent and (self._probes <= SETTLED_AFTER or self._probes - self._replayed >= SETTLED_EVERY):
            self._replayed_s, self._replayed = now, self._probes
            self._replay(STEPS)
        return True

    def known(self) -> dict[str, float]:
        """The round trips remembered, in seconds, the peers in the order of their last probes."""
        return {peer: float(self._rtts[row]) for peer, row in self._peers.items()}

    def moved(self, before: Coordinate, share: float, least_s: float) -> bool:
        """Whether we are no more where we were `before`: by a share of the median round trip, and at least so much."""
        if not self._peers:
            return False
        far_s = math.dist(before.place, self._place) + abs(before.height_s - self._height_s)
        return far_s > max(least_s, share * _middle(self._rtts[: len(self._peers)].copy()))

    def heard(self, peer: str, coordinate: Coordinate) -> None:
        """`peer` is at `coordinate` now, says gossip. Counts only for peers that were probed, and moves nothing yet."""
        row = self._peers.get(peer)
        if row is not None and coordinate.sound():
            self._learn(row, coordinate)

    def forget(self, peer: str) -> None:
        """A peer is gone: what was measured to it does not count any more."""
        row = self._peers.pop(peer, None)
        last = len(self._peers)
        if row is not None and row != last:  # the rows stay dense: the last one moves into the gap
            mover = next(other for other, held in self._peers.items() if held == last)
            self._peers[mover] = row
            for column in (self._places, self._heights, self._rtts, self._when):
                column[row] = column[last]

    def _learn(self, row: int, coordinate: Coordinate) -> None:
        self._places[row] = coordinate.place
        self._heights[row] = coordinate.height_s
        self._when[row] = self._probes

    def _replay(self, steps: int) -> None:
        count = len(self._peers)
        # On so few numbers a call costs more than what it computes: hence ufuncs, products and results put in place.
        total = np.add.reduce
        places, rtts = self._places[:count], self._rtts[:count]
        rests = rtts - self._heights[:count]
        scale = np.maximum(rtts, NOISE_S)
        limit_s = _middle(rtts.copy())
        base = np.minimum(scale**-1.5, MAX_SHARE * max(limit_s, NOISE_S) ** -1.5)
        base *= np.exp((self._when[:count] - self._probes) / (FIRST_AGE + AGE_SHARE * self._probes))
        pace = count / (count + CAUTION)
        place, height_s = self._place, self._height_s
        relative = rests
        for _ in range(steps):
            away = place - places
            distance = (away * away) @ _ONES
            distance += 1e-12
            np.sqrt(distance, out=distance)
            gaps = rests - distance
            gaps -= height_s
            reach_s = max(limit_s, _middle(np.abs(gaps)))
            relative = gaps / scale
            force = base / np.hypot(relative, SOFTNESS)
            sum_of_weights = float(total(force))
            force *= gaps
            push_s = float(total(force)) / sum_of_weights
            force /= distance
            step = force @ away
            length = math.sqrt(float(step @ step)) / sum_of_weights
            step *= pace * min(1.0, reach_s / length if length else 1.0) / sum_of_weights
            place = place + step
            height_s = min(max(height_s + pace * max(-reach_s, min(reach_s, push_s)), MIN_HEIGHT_S), MAX_HEIGHT_S)
        self._place = np.minimum(np.maximum(place, -MAX_PLACE_S), MAX_PLACE_S)
        self._height_s = height_s
        off = float(total(np.minimum(np.abs(relative), MAX_ERROR)))
        self._error = min(MAX_ERROR, (off + 2 * MAX_ERROR) / (count + 2))


def _middle(values: _Vector) -> float:
    """The upper median of values that are put out of order; numpy's own takes five times as long on so few."""
    half = len(values) // 2
    values.partition(half)
    return float(values[half])
