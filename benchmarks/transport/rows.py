"""The rows of the transport's benchmark, and how they come about: contenders in turns, medians over the rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Options:
    """What the command line asked of every part. `rounds`: how often each contender is measured."""

    only: tuple[str, ...] = ()
    quick: bool = False
    rounds: int = 5

    def wants(self, what: str) -> bool:
        """Whether a row named `what` was asked for: without --only all are."""
        return not self.only or any(word in what for word in self.only)


class LeftOut(Exception):
    """A part cannot be measured here. One line: what is missing and what would help."""


class Sample(NamedTuple):
    """One measurement. Either may be missing."""

    gb_per_s: float | None = None
    us_per_message: float | None = None


@dataclass(frozen=True)
class Row:
    """One figure. `size`: bytes of a message. `link`: "loopback", or the emulated link's words.

    `ratio_to_raw`: of bandwidths where there are some and the message is not a small one, else of times per message:
    this row's divided by that of the contender it is held against, as medians of the same rounds; None for that
    contender itself.
    """

    what: str
    size: int
    link: str
    gb_per_s: float | None
    us_per_message: float | None
    ratio_to_raw: float | None

    def whole(self) -> Row:
        """With what follows from the rest: a rate from a time, a time from a rate, and 1 where it is itself the raw."""
        rate, us = self.gb_per_s, self.us_per_message
        if rate is None and us:
            rate = self.size / us / 1e3
        if us is None and rate:
            us = self.size / rate / 1e3
        return replace(
            self, gb_per_s=rate, us_per_message=us, ratio_to_raw=1.0 if self.ratio_to_raw is None else self.ratio_to_raw
        )

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object, with four significant digits."""
        return {key: _short(value) for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Contender:
    """Something to measure. `raw`: the `what` of the contender, of the same turn, that it is held against."""

    what: str
    measure: Callable[[], Sample]
    raw: str | None = None


def interleaved(
    contenders: Sequence[Contender], size: int, link: str, rounds: int, *, by_time: bool = False
) -> Iterator[Row]:
    """Measure all contenders once a round, so that a slow moment of the machine hits all of them; give the medians.

    by_time: ratios are of times, also where bandwidths are known.
    """
    samples: dict[str, list[Sample]] = {contender.what: [] for contender in contenders}
    for _ in range(rounds):
        for contender in contenders:
            samples[contender.what].append(contender.measure())
    medians = {what: _median(taken) for what, taken in samples.items()}
    for contender in contenders:
        own, raw = medians[contender.what], medians.get(contender.raw or "")
        yield Row(contender.what, size, link, own.gb_per_s, own.us_per_message, _ratio(own, raw, by_time))


def _median(samples: Sequence[Sample]) -> Sample:
    rates = [sample.gb_per_s for sample in samples if sample.gb_per_s is not None]
    times = [sample.us_per_message for sample in samples if sample.us_per_message is not None]
    return Sample(statistics.median(rates) if rates else None, statistics.median(times) if times else None)


def _ratio(own: Sample, raw: Sample | None, by_time: bool) -> float | None:
    if raw is None:
        return None
    if not by_time and own.gb_per_s is not None and raw.gb_per_s:
        return own.gb_per_s / raw.gb_per_s
    if own.us_per_message is not None and raw.us_per_message:
        return own.us_per_message / raw.us_per_message
    return None


def _short(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) and math.isfinite(value) else value
