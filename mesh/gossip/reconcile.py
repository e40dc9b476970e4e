"""Anti-entropy: two peers find out what they know differently, at a cost that follows the difference.

    heads of pings differ -> Buckets -> Summary of the buckets that differ -> for each row that differs
        a Digest (I hold these versions of that site), answered with what is newer, or
        a Rumour and pages (you have never heard of that site), or
        a Want (I have never heard of it), answered with the same.

Every message stands for itself: no exchange has state, any may be lost, and whatever did not fit into the bound of an
exchange is found by the next. How often we start one follows what the last ones brought: at once again while there is
much to learn, more and more rarely while there is nothing, at most every `MAX_GAP_S`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mesh.gossip import config
from mesh.gossip.fingerprint import NAME_BYTES, ROW_BYTES, Fingerprints, split_rows
from mesh.gossip.members import ALIVE, SUSPECT, Claim
from mesh.gossip.messages import Buckets, Digest, Message, Page, Rumour, Summary, Want
from mesh.gossip.proof import IDENTITY
from mesh.gossip.state import State

#: Rows in one summary: with the largest head it still fits into a datagram.
SUMMARY_ROWS = 75
#: Longest time between two exchanges that we start, while whoever pings us knows something else.
MAX_GAP_S = 10.0
#: The same in a mesh of n sites: n times this. News is pushed; what remains for anti-entropy is what was lost.
GAP_PER_SITE_S = 0.02
#: The same with a peer with whom an exchange changed nothing on either side.
STUCK_GAP_S = 5.0
#: An exchange that taught us so much, and so much a member of a large mesh, is followed by the next after this share of
#: the least gap. Coordinates and links of 490 sites are some twenty entries in `MAX_GAP_S`: those are no reason.
MUCH, MUCH_SHARE, HASTE = 8, 1 / 12, 0.25
#: Bytes of one answer: what one stream carries. Over datagrams `Budget` allows less.
ANSWER_BYTES = config.MAX_STREAM_BYTES - 16 * 1024
#: A claim, or the head of a page, takes about so much.
CLAIM_BYTES = 150
#: Over datagrams we answer with so many bytes a second, after so many in one burst: beside a job's own traffic.
RATE_BYTES_S, BURST_BYTES = 128 * 1024, 128 * 1024


class Budget:
    """A token bucket over the bytes that anti-entropy may send in datagrams."""

    def __init__(self) -> None:
        """Full."""
        self._left = float(BURST_BYTES)
        self._when_s = 0.0

    def take(self, size_bytes: int, now: float) -> bool:
        """Whether so many bytes may be sent now."""
        self._left = min(BURST_BYTES, self._left + max(0.0, now - self._when_s) * RATE_BYTES_S)
        self._when_s = now
        if size_bytes > self._left:
            return False
        self._left -= size_bytes
        return True


class Reconciler:
    """What to say to a peer that knows something else. Gives messages; whoever runs it sends them, in this order."""

    def __init__(
        self,
        prints: Fingerprints,
        state: State,
        *,
        claim: Callable[[str], Claim | None],
        gap_s: float,
    ) -> None:
        """`claim(site)` is what we say of a site, ourselves included; `gap_s` the pace of exchanges in a small mesh."""
        self._prints = prints
        self._state = state
        self._claim = claim
        self._quiet_s = gap_s
        self._gap_s = HASTE * gap_s
        self._next_s = 0.0
        self._started_s = 0.0
        self._learnt = 0
        self._last: dict[str, tuple[bytes, bytes]] = {}

    def forget(self, site: str) -> None:
        """The site is gone."""
        self._last.pop(site, None)

    def learnt(self) -> None:
        """An exchange taught us something. If it is much, there is probably more."""
        self._learnt += 1
        sites = len(self._prints)
        if self._learnt == max(min(MUCH, 1 + sites // MUCH), int(MUCH_SHARE * sites)):
            self._gap_s = HASTE * self._quiet_s
            self._next_s = min(self._next_s, self._started_s + self._gap_s)

    def start(self, site: str, theirs: bytes, now: float) -> list[Message]:
        """What opens an exchange with a site whose fingerprint differs; nothing while it is too early for one."""
        if now < self._next_s:
            return []
        sites, both = len(self._prints), (theirs, self._prints.whole())
        quiet_s = max(self._quiet_s, min(MAX_GAP_S, GAP_PER_SITE_S * sites))
        if self._last.get(site) == both:  # the last exchange changed nothing: two sites claim one name
            quiet_s = max(quiet_s, STUCK_GAP_S)
        self._last[site] = both
        self._gap_s = min(quiet_s, self._gap_s * 2)
        self._learnt = 0
        self._started_s = now
        self._next_s = now + self._gap_s
        count = self._prints.level()
        if count == 1:
            return list(self._summaries(1, [0]))
        return [Buckets(count, self._prints.buckets(count))]

    def on_buckets(self, message: Buckets) -> list[Message]:
        """Rows for every bucket that differs."""
        return list(self._summaries(message.total, self._prints.differing(message.total, message.hashes)))

    def on_summary(self, message: Summary) -> list[Message]:
        """What the other lacks, what we want, and our versions of what differs."""
        ours: dict[bytes, bytes] = {}
        for bucket in message.buckets:
            ours.update(self._prints.rows(message.total, bucket))
        wanted: list[bytes] = []
        digests: list[Message] = []
        for name, short in split_rows(message.rows):
            held = ours.pop(name, None)
            if held == short:
                continue
            site = self._prints.site(name)
            if site is None:
                wanted.append(name)
                continue
            if held is None:  # gone, as far as we know
                digests += self._said(site)
            digests.append(self._digest(site, answer=False))
        told = [site for name in ours if (site := self._prints.site(name)) is not None]
        return [*_wants(wanted), *digests, *self._everything(told)]

    def on_want(self, message: Want) -> list[Message]:
        """All that we know of these sites."""
        names = (message.names[start : start + NAME_BYTES] for start in range(0, len(message.names), NAME_BYTES))
        return self._everything([site for name in names if (site := self._prints.site(name)) is not None])

    def on_digest(self, message: Digest) -> list[Message]:
        """What is newer here; and our own digest in return, where the other has something newer too."""
        answers: list[Message] = []
        claim = self._claim(message.site)
        if claim is not None and claim.incarnation > message.incarnation:
            answers.append(Rumour(claim))
        newer = self._state.newer_than(message.site, message.generation, message.versions)
        if claim is None or claim.state in (ALIVE, SUSPECT):
            answers += self._pages(message.site, newer)
        behind = claim is not None and message.incarnation > claim.incarnation
        if not message.answer and (
            behind or self._state.older_than(message.site, message.generation, message.versions)
        ):
            answers.append(self._digest(message.site, answer=True))
        return answers

    def _summaries(self, count: int, buckets: Iterable[int]) -> Iterable[Summary]:
        """Rows of these buckets, in as many summaries as they need. An overfull bucket is cut."""
        numbers, rows, size = bytearray(), bytearray(), 0
        for bucket in buckets:
            found = list(self._prints.rows(count, bucket).items())[:SUMMARY_ROWS]
            if numbers and size + len(found) > SUMMARY_ROWS:
                yield Summary(count, bytes(numbers), bytes(rows))
                numbers, rows, size = bytearray(), bytearray(), 0
            numbers.append(bucket)
            rows += b"".join(name + short for name, short in found)
            size += len(found)
        if numbers:
            yield Summary(count, bytes(numbers), bytes(rows))

    def _said(self, site: str) -> list[Message]:
        claim = self._claim(site)
        return [] if claim is None else [Rumour(claim, news=False)]

    def _everything(self, sites: list[str]) -> list[Message]:
        """All about these sites, up to `ANSWER_BYTES`: each one's key and the claim that it proves first."""
        said: list[Message] = []
        room_bytes = ANSWER_BYTES
        for site in sites:
            for message in (*self._state.pages(site, IDENTITY), *self._said(site)):
                said.append(message)
                room_bytes -= CLAIM_BYTES + (len(message.data) if type(message) is Page else 0)
            if room_bytes < 0:
                break
        for site in sites:
            if room_bytes < 0:
                break
            for page in self._pages(site, [key for key in self._state.keys(site) if key != IDENTITY]):
                said.append(page)
                room_bytes -= len(page.data) + CLAIM_BYTES
        return said

    def _pages(self, site: str, keys: list[str]) -> list[Page]:
        return [page for key in keys for page in self._state.pages(site, key)]

    def _digest(self, site: str, *, answer: bool) -> Digest:
        claim, owner = self._claim(site), self._state.owner(site)
        incarnation = 1 if claim is None else claim.incarnation
        return Digest(site, incarnation, owner.generation, owner.versions(), answer)


def _wants(names: list[bytes]) -> list[Message]:
    step = SUMMARY_ROWS * ROW_BYTES // NAME_BYTES
    return [Want(b"".join(names[start : start + step])) for start in range(0, len(names), step)]
