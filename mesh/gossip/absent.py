"""Those who are not there: seeds, the dead and the forgotten, called with back-off for ever; graves that stay shut.

Both halves of a partition think the other dead, and somebody has to find out. So every address that a member was lost
at is kept when the member itself is forgotten, and called: soon after the loss, then less and less often, and all
together at most every `CALL_GAP_S`. Those that left are not called.

The same book refuses claims that are not newer than a death or a farewell, so that nobody comes back from the grave by
hearsay. Hearsay that a dead site lives is a reason to call it at once; when it answers it is told of its death, raises
its incarnation, and with that everybody has it back.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from mesh.gossip import config
from mesh.gossip.members import ALIVE, DEAD, LEFT, SUSPECT, Claim, Peer
from mesh.gossip.messages import Rumour
from mesh.gossip.own import Own
from mesh.gossip.probing import Prober
from mesh.gossip.timers import Timer

#: Absent sites remembered, and seeds.
MAX_ABSENT = config.MAX_MEMBERS
MAX_SEEDS = 256
#: Least time between two calls: two a second, however many are absent; and between calls for which there is a reason.
CALL_GAP_S = 0.5
HINT_GAP_S = 0.05
#: With very many absent each is called less often, so that all calls together settle at one a second.
CALLED_EACH_S = 1.0
#: Calls whose turn came late, because many are absent, are spaced by at least this share of the time since the loss.
OLD_SHARE = 0.1
#: Beyond so many members newcomers are not greeted: their number is what makes greetings expensive.
MAX_GREETED = 24


class Known(NamedTuple):
    """A site worth remembering over a restart. `state` is "alive", "suspect", "dead" or "left"."""

    site: str
    address: str
    incarnation: int
    state: str


@dataclass(slots=True, eq=False)
class _Absent:
    """A site that was lost. Claims not newer than `claim` are refused until `refused_until_s`."""

    claim: Claim
    refused_until_s: float
    delay_s: float
    noted_s: float
    due_s: float = float("inf")


@dataclass(slots=True)
class _Seed:
    address: str
    delay_s: float
    site: str = ""
    timer: Timer | None = None


class Absentees:
    """See the module."""

    def __init__(self, own: Own, prober: Prober) -> None:
        """`prober` sends the pings."""
        self._own = own
        self._prober = prober
        self._seeds: dict[str, _Seed] = {}
        self._book: dict[str, _Absent] = {}
        self._due: list[tuple[float, int, _Absent]] = []
        self._count = 0
        self._calling = 0
        self._alarm: Timer | None = None
        self._open_s = float("-inf")

    # ---------------------------------------------------------------- seeds

    def join(self, addresses: Iterable[str], now: float) -> None:
        """Call addresses until somebody answers, with back-off; and again whenever that member is lost."""
        for address in addresses:
            if address != self._own.address and address not in self._seeds and len(self._seeds) < MAX_SEEDS:
                seed = self._seeds[address] = _Seed(address, self._own.t.retry_first_s)
                self._call_seed(seed, now)

    def not_a_seed(self, address: str) -> None:
        """It is our own address."""
        self._seeds.pop(address, None)

    def seed_answered(self, address: str, site: str) -> None:
        """We know who is at a seed's address."""
        if address in self._seeds:
            self._seeds[address].site = site

    def _call_seed(self, seed: _Seed, now: float) -> None:
        own, t = self._own, self._own.t
        if own.quiet or self._seeds.get(seed.address) is not seed:
            return
        holder = own.roster.get(seed.site)
        if t.fixed and seed.site:
            return  # memberlist joins once
        if holder is not None and holder.live:
            seed.delay_s = t.retry_first_s
            seed.timer = own.timers.at(now + t.retry_max_s, lambda then: self._call_seed(seed, then))
            return
        self._prober.ping(seed.address, "", now, "seed")
        seed.timer = own.timers.at(now + own.jitter(seed.delay_s), lambda then: self._call_seed(seed, then))
        seed.delay_s = min(t.retry_max_s, seed.delay_s * t.retry_factor)

    # ---------------------------------------------------------------- the book of those that were lost

    def remember(self, known: Iterable[Known], now: float) -> None:
        """Those that an earlier start of ours knew: call all but the left until they answer."""
        own = self._own
        for site, address, incarnation, state in known:
            if site == own.site:
                if incarnation < config.MAX_COUNTER:
                    own.incarnation = max(own.incarnation, incarnation + 1)
            elif own.roster.get(site) is None and site not in self._book and len(self._book) < MAX_ABSENT:
                kept = LEFT if state == LEFT else DEAD
                until_s = now + own.t.left_reap_s if kept == LEFT else float("-inf")
                self._note(Claim(site, address, kept, incarnation), until_s, now, now + own.rng.random() / 2)

    def known(self) -> list[Known]:
        """Everybody, the absent included, sorted by name."""
        everybody = {site: absent.claim for site, absent in self._book.items()}
        everybody |= {site: peer.claim() for site, peer in self._own.roster.peers.items()}
        return [Known(*claim[:2], claim.incarnation, claim.state) for _, claim in sorted(everybody.items())]

    def lost(self, claim: Claim, now: float, *, refuse_until_s: float) -> None:
        """A member is dead or left: refuse hearsay up to this claim for a while, and call it if it is dead."""
        self._note(claim, refuse_until_s, now, now + self._own.t.retry_first_s)

    def found(self, site: str) -> None:
        """A member is there."""
        absent = self._book.pop(site, None)
        if absent is not None and absent.claim.state == DEAD:
            self._calling -= 1

    def admits(self, claim: Claim, now: float) -> bool:
        """Whether a claim about a site that is no member may make it one."""
        absent = self._book.get(claim.site)
        if absent is None or now >= absent.refused_until_s or claim.incarnation > absent.claim.incarnation:
            return True
        self.hint(claim.site, now)
        return False

    def grave(self, site: str, now: float) -> Claim | None:
        """The death or farewell that keeps a forgotten site from coming back as it was, or None."""
        absent = self._book.get(site)
        return absent.claim if absent is not None and now < absent.refused_until_s else None

    def hint(self, site: str, now: float) -> None:
        """Hearsay has it that a dead site lives: call it before its time."""
        absent = self._book.get(site)
        if absent is not None and absent.claim.state == DEAD and absent.due_s > now + self._own.t.retry_first_s:
            absent.delay_s = self._own.t.retry_first_s
            self._call_at(absent, now + HINT_GAP_S * self._own.rng.random())

    def _note(self, claim: Claim, refuse_until_s: float, now: float, due_s: float) -> None:
        self.found(claim.site)
        while len(self._book) >= MAX_ABSENT:
            self.found(next(iter(self._book)))
        absent = self._book[claim.site] = _Absent(claim, refuse_until_s, self._own.t.retry_first_s, now)
        if claim.state == DEAD:
            self._calling += 1
            if not self._own.t.fixed:
                self._call_at(absent, due_s)

    def _call_at(self, absent: _Absent, due_s: float) -> None:
        absent.due_s = due_s
        self._count += 1
        heapq.heappush(self._due, (due_s, self._count, absent))
        self._set_alarm()

    def _set_alarm(self) -> None:
        due, book = self._due, self._book
        while due and (book.get(due[0][2].claim.site) is not due[0][2] or due[0][0] != due[0][2].due_s):
            heapq.heappop(due)
        if not due:
            return
        when_s = max(due[0][0], self._open_s)
        if self._alarm is None or self._alarm.cancelled or when_s < self._alarm.when_s:
            if self._alarm is not None:
                self._alarm.cancel()
            self._alarm = self._own.timers.at(when_s, self._call)

    def _call(self, now: float) -> None:
        own, t = self._own, self._own.t
        if own.quiet:
            return
        if self._due and self._due[0][0] <= now:
            absent = heapq.heappop(self._due)[2]
            if self._book.get(absent.claim.site) is absent and absent.due_s <= now:
                claim = absent.claim
                self._prober.ping(claim.address, claim.site, now, "plain")
                if now < absent.refused_until_s:
                    own.send(claim.address, Rumour(claim))
                hinted = absent.delay_s == t.retry_first_s
                self._open_s = now + (HINT_GAP_S if hinted else CALL_GAP_S)
                most_s = max(t.retry_max_s, self._calling * CALLED_EACH_S)
                absent.delay_s = min(most_s, max(absent.delay_s * t.retry_factor, OLD_SHARE * (now - absent.noted_s)))
                self._call_at(absent, now + own.jitter(absent.delay_s))
        self._set_alarm()

    # ---------------------------------------------------------------- those who just came

    def greet(self, peer: Peer, now: float) -> None:
        """A few quick pings, so that the pair's RTT is known within a second and the states meet at once."""
        if len(self._own.roster) <= MAX_GREETED:
            peer.greetings = self._own.t.greetings
            self._greet(peer, now)

    def _greet(self, peer: Peer, now: float) -> None:
        own = self._own
        if peer.state in (ALIVE, SUSPECT) and peer.greetings > 0 and not own.quiet:
            peer.greetings -= 1
            self._prober.ping(peer.address, peer.site, now, "plain")
            own.timers.at(now + own.jitter(own.t.greet_s), lambda then: self._greet(peer, then))
