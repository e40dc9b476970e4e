"""How often something is answered: a token bucket for each source, and one over all."""

from __future__ import annotations

from collections import OrderedDict

MAX_SOURCES = 2048


class _Bucket:
    __slots__ = ("at_s", "left")

    def __init__(self, burst: float, now: float) -> None:
        self.left = burst
        self.at_s = now

    def take(self, rate: float, burst: float, now: float) -> bool:
        self.left = min(burst, self.left + rate * max(0.0, now - self.at_s))
        self.at_s = now
        if self.left < 1.0:
            return False
        self.left -= 1.0
        return True


class Limit:
    """`per_source` and `overall` are (a second, at once)."""

    def __init__(self, per_source: tuple[float, float], overall: tuple[float, float]) -> None:
        self._per_source = per_source
        self._overall = overall
        self._sources: OrderedDict[str, _Bucket] = OrderedDict()
        self._all: _Bucket | None = None

    def allows(self, source: str, now: float) -> bool:
        """Whether `source` may be answered now. Counts it if so."""
        bucket = self._sources.get(source)
        if bucket is None:
            bucket = self._sources[source] = _Bucket(self._per_source[1], now)
            if len(self._sources) > MAX_SOURCES:
                self._sources.popitem(last=False)
        self._sources.move_to_end(source)
        if not bucket.take(*self._per_source, now):
            return False
        if self._all is None:
            self._all = _Bucket(self._overall[1], now)
        return self._all.take(*self._overall, now)
