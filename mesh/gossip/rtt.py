"""Round-trip times of one pair, measured by the probes that are sent anyway."""

from __future__ import annotations

from statistics import median
from typing import NamedTuple

#: Samples kept per pair. At one probe a second and pair this is half a minute: long enough for a steady minimum, short
#: enough to follow a changed route.
WINDOW = 32

#: A longer round trip is a clock that jumped, not a network.
ABSURD_S = 60.0


class Rtt(NamedTuple):
    """What a window of probes says. `jitter_s` is the mean distance from the median, `loss` the share unanswered."""

    min_s: float
    median_s: float
    jitter_s: float
    samples: int
    loss: float = 0.0


class RttWindow:
    """The last `WINDOW` round trips to one peer, and the fate of the last `WINDOW` probes.

    Lists, because most peers of a large mesh are measured a few times: two deques take a kilobyte before the first.
    """

    __slots__ = ("_lost", "_samples", "_summary")

    def __init__(self) -> None:
        self._samples: list[float] | None = None
        self._lost: list[bool] | None = None
        self._summary: Rtt | None = None

    def answered(self, rtt_s: float) -> None:
        """Take one measured round trip; absurd ones are ignored."""
        if 0.0 <= rtt_s <= ABSURD_S:
            if self._samples is None:
                self._samples = []
            elif len(self._samples) >= WINDOW:
                del self._samples[0]
            self._samples.append(rtt_s)
            self._fate(lost=False)

    def lost(self) -> None:
        """A direct probe stayed without an answer."""
        self._fate(lost=True)

    def _fate(self, *, lost: bool) -> None:
        if self._lost is None:
            self._lost = []
        elif len(self._lost) >= WINDOW:
            del self._lost[0]
        self._lost.append(lost)
        self._summary = None

    @property
    def measured(self) -> bool:
        """Whether any probe was answered."""
        return self._samples is not None

    def summary(self) -> Rtt | None:
        """Minimum, median, jitter and loss, or None before the first answer."""
        samples, fates = self._samples, self._lost
        if self._summary is None and samples and fates:
            middle = median(samples)
            spread = sum([abs(sample - middle) for sample in samples]) / len(samples)
            self._summary = Rtt(min(samples), middle, spread, len(samples), sum(fates) / len(fates))
        return self._summary

    def timeout_s(
        self, *, floor_s: float, default_s: float, ceiling_s: float, estimate_s: float | None = None
    ) -> float:
        """How long to wait for an answer: median plus four spreads (as TCP, RFC 6298) plus 50 ms for scheduling.

        Before there are three samples: the default, or twice the median, or where nothing was measured yet twice
        `estimate_s`, a guess from elsewhere, if that is longer.
        """
        summary = self.summary()
        if summary is None or summary.samples < 3:
            likely_s = estimate_s if summary is None else summary.median_s
            return min(ceiling_s, max(default_s, 2.0 * (likely_s or 0.0) + 0.05))
        return min(ceiling_s, max(floor_s, summary.median_s + 4.0 * summary.jitter_s + 0.05))
