"""The links of one site: what it measures, what of that it tells the mesh, and how often.

Up to `WHOLE_MATRIX` sites everybody publishes all links, so the measured matrix is known to all. Above, a site
publishes its nearest, a sample drawn by a hash of the pair so that both ends draw it, and paths that it finds broken;
coordinates fill the rest. What is published is worth `BUDGET_BYTES_S` to each receiver, all sites together, whatever
their number; a path that breaks or heals may go into debt.

The document under "links" is {site: [minimum, median and jitter in us, loss in thousandths, out, in, bytes/s, age of
the last round trip in s, transport]}; each may be None where it is not known. `read` takes such documents from others,
and believes no figure that cannot be.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from statistics import median
from typing import Any, Final, NamedTuple

import msgpack

from mesh.gossip.rtt import Rtt

#: Sites up to which the measured matrix itself is gossiped: 64 times 63 links are about 120 KB in all.
WHOLE_MATRIX: Final = 64
#: What a site publishes above that.
NEAREST, SAMPLE, BROKEN = 16, 8, 8
#: Below this a change of RTT or jitter is scheduling noise.
NOISE_S: Final = 0.5e-3
#: What the link entries of all sites together may cost each peer, in the long run and at once in a new mesh. A quiet
#: mesh may spend 2 KB/s, of which the probes of 490 sites take 0.3; coordinates have a budget of their own.
BUDGET_BYTES_S, BURST_BYTES = 300.0, 400_000
#: Above `WHOLE_MATRIX` sites nothing is spent at once: sites that start together publish first within this long each,
#: 12 minutes in all for 490, which then cost each 0.7 KB/s all in all. Who joins a mesh that has spoken does not wait.
FIRST_EACH_S: Final = 1.5
#: How many documents a broken path may borrow.
DEBT: Final = 3
#: What an entry costs on the wire beside its value: names, version, proof, and its share of anti-entropy. Measured on
#: the virtual network with 490 sites: 400 bytes for an entry of 110.
OVERHEAD_BYTES: Final = 290
#: A smaller transfer is latency more than bandwidth.
LEAST_TRANSFER_BYTES: Final = 64 * 1024
#: Transfers remembered by site, and sites with transfers.
TRANSFERS, MAX_TRANSFERRED = 8, 1024
#: A link without a recent transfer is probed at most so often, and a site sends a probe at most every `PROBE_GAP_S`.
#: Links never seen are probed sooner where there are few: with `FIRST_GAP_S` for each link between two probes. So three
#: sites know their links within seconds; 64 spend 8 KB/s each for two hours (bursts are 1 MiB), and then 2 KB/s.
BANDWIDTH_AGE_S, PROBE_GAP_S, FIRST_GAP_S = 6 * 3600.0, 600.0, 2.0
#: A probe that failed is tried again after twice as long each time, at most after this.
MAX_BACKOFF_S = 6 * 3600.0
#: Bounds of what is believed.
MAX_RTT_S, MAX_BANDWIDTH, MAX_LINKS, MAX_AGE_S = 60.0, 1e13, 1024, 1e9
#: The transports there are: see `transport.available`.
TRANSPORTS = frozenset({"tcp", "ucx"})


class LinkReport(NamedTuple):
    """What one end says of a link; None where it does not know.

    `out`: whether what it sends arrives; `into`: whether it hears the other. `bandwidth` is bytes/s out. `age_s`: how
    long ago the last round trip was measured, when this was said. `transport`: which proved best when they were
    measured against each other.
    """

    min_s: float | None = None
    median_s: float | None = None
    jitter_s: float = 0.0
    loss: float = 0.0
    out: bool | None = None
    into: bool | None = None
    bandwidth: float | None = None
    age_s: float | None = None
    transport: str | None = None

    @classmethod
    def of(
        cls,
        rtt: Rtt | None,
        out: bool | None,
        into: bool | None,
        bandwidth: float | None,
        *,
        age_s: float | None = None,
        transport: str | None = None,
    ) -> LinkReport:
        """From what is measured here."""
        if rtt is None:
            return cls(None, None, 0.0, 0.0, out, into, bandwidth, age_s, transport)
        return cls(rtt.min_s, rtt.median_s, rtt.jitter_s, rtt.loss, out, into, bandwidth, age_s, transport)

    @property
    def cut(self) -> bool:
        """Whether either direction is known not to work."""
        return self.out is False or self.into is False

    def differs(self, other: LinkReport) -> bool:
        """Whether the minimum moved by more than 5 %, the jitter by more than a half (or 5 % of the minimum), the loss
        by more than 0.1, the bandwidth by more than a half, or another transport is best. Age alone is no news."""
        if self.transport != other.transport:
            return True
        if (self.min_s is None) != (other.min_s is None) or (self.bandwidth is None) != (other.bandwidth is None):
            return True
        least_s = self.min_s or 0.0
        moved = abs(least_s - (other.min_s or 0.0)) > max(NOISE_S, 0.05 * least_s)
        spread = abs(self.jitter_s - other.jitter_s) > max(2 * NOISE_S, 0.5 * self.jitter_s, 0.05 * least_s)
        rate = abs((self.bandwidth or 0.0) - (other.bandwidth or 0.0)) > 0.5 * (self.bandwidth or 0.0)
        return moved or spread or rate or abs(self.loss - other.loss) > 0.1

    def row(self) -> list[Any]:
        """The document's row."""
        return [
            None if self.min_s is None else round(1e6 * self.min_s),
            None if self.median_s is None else round(1e6 * self.median_s),
            round(1e6 * self.jitter_s),
            round(1e3 * self.loss),
            self.out,
            self.into,
            None if self.bandwidth is None else round(self.bandwidth),
            None if self.age_s is None else round(self.age_s),
            self.transport,
        ]


def read(document: object) -> dict[str, LinkReport]:
    """What a peer says of its links. Rows that no honest peer writes are left out."""
    if not isinstance(document, Mapping) or len(document) > MAX_LINKS:
        return {}
    reports = {}
    for site, row in document.items():
        try:
            least, middle, jitter, loss, out, into, bandwidth, age, transport = row
            reports[str(site)] = LinkReport(
                _within(least, 1e6 * MAX_RTT_S, 1e6),
                _within(middle, 1e6 * MAX_RTT_S, 1e6),
                _within(jitter, 1e6 * MAX_RTT_S, 1e6) or 0.0,
                _within(loss, 1e3, 1e3) or 0.0,
                _truth(out),
                _truth(into),
                _within(bandwidth, MAX_BANDWIDTH, 1.0) or None,
                _within(age, MAX_AGE_S, 1.0),
                _transport(transport),
            )
        except (TypeError, ValueError, OverflowError):
            continue
    return reports


def _within(value: object, most: float, per: float) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise ValueError("out of bounds")
    return float(value) / per


def _truth(value: object) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    raise ValueError("not a truth value")


def _transport(value: object) -> str | None:
    if value is None or (isinstance(value, str) and value in TRANSPORTS):
        return value
    raise ValueError("not a transport")


def shared_draw(one: str, other: str) -> bytes:
    """A number for a pair, the same at both ends: the smallest are the pairs that both ends publish."""
    return blake2b("\n".join(sorted((one, other))).encode(), digest_size=8).digest()


class Pace:
    """A purse of bytes: what may be published now, so that all sites together cost each peer a fixed rate.

    It holds a site's share of the burst. In a large mesh it holds one document, and the first is held back for a time
    that differs from site to site, so that a mesh that starts together does not publish together.
    """

    def __init__(self, budget_bytes_s: float, site: str) -> None:
        """`budget_bytes_s` is for all sites together."""
        self._budget_bytes_s = budget_bytes_s
        self._begins = int.from_bytes(shared_draw(site, site)) / 2**64
        self._spent = 0.0
        self._since_s: float | None = None
        self._first_s = -math.inf

    def waits(self, sites: int, now: float) -> bool:
        """Whether nothing can be paid now, whatever its size. False where that is not known."""
        if sites <= WHOLE_MATRIX or self._since_s is None:
            return False
        earned = max(0.0, now - self._since_s) * self._budget_bytes_s / sites
        return now < self._first_s or self._spent > earned

    def pay(self, size_bytes: int, sites: int, now: float, *, urgent: bool = False, fellows: int | None = None) -> bool:
        """Pay for a document that `sites` sites publish alike, if the purse allows it; what is urgent may borrow.

        `fellows`: how many of them have not published any yet, all as far as is known. They take turns.
        """
        large = sites > WHOLE_MATRIX
        holds = size_bytes if large else max(size_bytes, BURST_BYTES / max(1, sites))
        if self._since_s is None:
            waiting = sites if fellows is None else fellows
            self._first_s = now + self._begins * FIRST_EACH_S * waiting if large else now
        else:
            earned = max(0.0, now - self._since_s) * self._budget_bytes_s / max(1, sites)
            self._spent = max(0.0, self._spent - earned)
        self._since_s = now
        if now < self._first_s or self._spent + size_bytes > holds + (DEBT * size_bytes if urgent else 0):
            return False
        self._spent += size_bytes
        return True


@dataclass(slots=True)
class _Transfers:
    """What was seen of the bandwidth to one site. `failures` in a row hold the next probe back until `after_s`."""

    rates: deque[float] = field(default_factory=lambda: deque(maxlen=TRANSFERS))
    last_s: float = -math.inf
    failures: int = 0
    after_s: float = -math.inf
    transport: str | None = None


class Links:
    """The links last published, the transfers seen, and whether new measurements are worth telling."""

    def __init__(self, site: str) -> None:
        """`site` is our own name."""
        self._site = site
        self._published: dict[str, LinkReport] | None = None
        self._pace = Pace(BUDGET_BYTES_S, site)
        self._transfers: dict[str, _Transfers] = {}
        self._probed_s = -math.inf

    def transferred(self, site: str, size_bytes: int, seconds: float, now: float) -> None:
        """So many bytes reached `site` in so many seconds. Small and impossible transfers are ignored."""
        if size_bytes < LEAST_TRANSFER_BYTES or not 0 < seconds < math.inf or size_bytes / seconds > MAX_BANDWIDTH:
            return
        transfers = self._of(site)
        transfers.rates.append(size_bytes / seconds)
        transfers.last_s = now
        transfers.failures = 0

    def _of(self, site: str) -> _Transfers:
        if site not in self._transfers and len(self._transfers) >= MAX_TRANSFERRED:
            del self._transfers[next(iter(self._transfers))]
        return self._transfers.setdefault(site, _Transfers())

    def chose(self, site: str, transport: str | None) -> None:
        """Which transport proved best to `site`, where several were measured."""
        self._of(site).transport = transport

    def probe_failed(self, site: str, now: float) -> None:
        """The transfer that `to_probe` asked for came to nothing: that site is left alone for a while."""
        transfers = self._of(site)
        transfers.failures += 1
        transfers.after_s = now + min(MAX_BACKOFF_S, PROBE_GAP_S * 2.0 ** min(transfers.failures - 1, 16))

    def bandwidth(self, site: str) -> float | None:
        """Bytes/s to a site: the median of the last transfers; None before the first."""
        transfers = self._transfers.get(site)
        return median(transfers.rates) if transfers is not None and transfers.rates else None

    def transport(self, site: str) -> str | None:
        """The transport that proved best to a site; None where nothing was compared."""
        transfers = self._transfers.get(site)
        return None if transfers is None else transfers.transport

    def to_probe(self, now: float) -> str | None:
        """A published link whose bandwidth nobody has seen for hours; seldom (`PROBE_GAP_S`), failures last.

        Whoever asks sends it a short transfer and says so by `transferred`, or `probe_failed`.
        """
        links = self._published or {}
        waited_s = now - self._probed_s
        if waited_s < min(PROBE_GAP_S, FIRST_GAP_S * len(links)):
            return None
        due: list[tuple[int, str]] = []
        for site, report in links.items():
            seen = self._transfers.get(site) or _Transfers()
            aged = now - seen.last_s > BANDWIDTH_AGE_S and now >= seen.after_s
            if aged and not report.cut and (not seen.rates or waited_s >= PROBE_GAP_S):
                due.append((seen.failures, site))
        if not due:
            return None
        self._probed_s = now
        return min(due)[1]

    def forget(self, site: str) -> None:
        """A site is gone."""
        self._transfers.pop(site, None)

    @property
    def untold(self) -> bool:
        """Whether nothing was published yet."""
        return self._published is None

    def idle(self, broken: Callable[[str], bool], others: int, now: float) -> bool:
        """Whether there is no need to look for changes: none could be paid for, and no path told of broke or healed."""
        told = self._published or {}
        return self._pace.waits(others + 1, now) and not any(said.cut != broken(site) for site, said in told.items())

    def changed(
        self, reports: Mapping[str, LinkReport], now: float, fellows: int | None = None, others: int | None = None
    ) -> dict[str, Any] | None:
        """The document to publish, or None if the last one still holds, or another would cost too much now.

        `fellows`: sites that have not published any yet, None where that is not known. `others`: live sites, where
        `reports` leaves out those of which nothing is known.
        """
        others = len(reports) if others is None else others
        chosen = self._chosen(reports, others)
        old = self._published
        # In a large mesh the first word waits until there is a nearest to choose.
        if old is None and len(chosen) < (1 if others < WHOLE_MATRIX else NEAREST + SAMPLE):
            return None
        urgent = old is not None and any(site in old and old[site].cut != said.cut for site, said in chosen.items())
        if old is not None and not urgent and not self._differ(old, chosen, reports, others):
            return None
        document = {site: report.row() for site, report in sorted(chosen.items())}
        size_bytes = len(msgpack.packb(document)) + OVERHEAD_BYTES
        if not self._pace.pay(size_bytes, others + 1, now, urgent=urgent, fellows=fellows):
            return None
        self._published = chosen
        return document

    def _differ(
        self, old: Mapping[str, LinkReport], new: Mapping[str, LinkReport], reports: Collection[str], others: int
    ) -> bool:
        if any(site in old and said.differs(old[site]) for site, said in new.items()):
            return True
        gone = [site for site in old if site not in reports]
        swapped = len(new.keys() - old.keys())
        # Above the whole matrix two sites that are equally near may change places with every probe.
        return bool(gone) or len(new) > len(old) or swapped > (0 if others <= WHOLE_MATRIX else NEAREST // 4)

    def _chosen(self, reports: Mapping[str, LinkReport], others: int) -> dict[str, LinkReport]:
        known = {site: said for site, said in reports.items() if said.min_s is not None or said.cut}
        if others < WHOLE_MATRIX:
            return known
        return {site: known[site] for site in choose(self._site, known)}


def choose(site: str, known: Mapping[str, LinkReport]) -> list[str]:
    """Which of many links a site publishes: the nearest, the sample it shares with the other ends, some broken ones."""

    def draw(other: str) -> bytes:
        return shared_draw(site, other)

    measured = sorted(other for other, said in known.items() if said.min_s is not None)
    nearest = sorted(measured, key=lambda other: known[other].min_s or 0.0)[:NEAREST]
    sample = sorted(set(measured) - set(nearest), key=draw)[:SAMPLE]
    broken = sorted((other for other, said in known.items() if said.cut), key=draw)[:BROKEN]
    return sorted({*nearest, *sample, *broken})
