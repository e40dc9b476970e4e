"""What all sites publish, as one peer holds it, spreads it and compares it with others.

Puts together `state` (what is held), `spread` (news is pushed), `fingerprint` and `reconcile` (what was missed).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from mesh.gossip.codec import pack_message
from mesh.gossip.fingerprint import Fingerprints, mark, name_hash
from mesh.gossip.members import ALIVE, SUSPECT, Claim
from mesh.gossip.messages import Buckets, Digest, Message, Page, Sender, Summary, Want
from mesh.gossip.post import Post
from mesh.gossip.proof import CLUSTER, IDENTITY, Proofs, Statement
from mesh.gossip.reconcile import Budget, Reconciler
from mesh.gossip.sealing import Forged
from mesh.gossip.spread import Spread
from mesh.gossip.state import Outcome, State

#: An answer of anti-entropy from this size on goes over a stream, where there are streams.
STREAM_FROM_BYTES = 16 * 1024
#: Sites whose key is asked for at a time, and how soon again.
MAX_STRANGERS = 1024
STRANGER_S = 1.0


class Members(NamedTuple):
    """What entries need to know of membership. `claim` is what we say of a site, ourselves included."""

    claim: Callable[[str], Claim | None]
    others: Callable[[], int]
    restarted: Callable[[str], None]


class Entries:
    """See the module."""

    def __init__(
        self,
        state: State,
        post: Post,
        proofs: Proofs,
        members: Members,
        counters: Counter[str],
        *,
        emit: Callable[[str, str, str], None],
        fanout: int,
        gap_s: float,
    ) -> None:
        """`emit(kind, site, key)` tells the user; `gap_s` is the pace of exchanges in a small mesh."""
        self._site = state.site
        self._post = post
        self._proofs = proofs
        self._members = members
        self._counters = counters
        self._emit = emit
        self.state = state
        self.changes = 0
        self.spread = Spread(fanout, state.pages)
        self._prints = Fingerprints()
        self._dirty: dict[str, None] = {state.site: None}
        self._reconciler = Reconciler(self._prints, state, claim=members.claim, gap_s=gap_s)
        self._budget = Budget()
        self._strangers: dict[str, float] = {}
        self._early: dict[str, tuple[Sender, Page]] = {}

    # ---------------------------------------------------------------- telling

    def publish(self, key: str, value: dict[str, Any], *, urgent: bool) -> bool:
        """Write an entry of our own. False if it is there already. Raises ValueError if it is out of bounds."""
        news = self.state.publish(key, value)
        if news:
            self.spread.publish(self._site, key, self._members.others(), urgent=urgent)
        return news

    def publish_cluster(self, key: str, value: dict[str, Any], version: int, proof: bytes) -> bool:
        """Install an entry of the cluster's authority. Raises ValueError: out of bounds, or not the authority's."""
        news = self.state.publish_cluster(key, value, version, proof)
        if news:
            self._emit("updated", CLUSTER, key)
            self.spread.publish(CLUSTER, key, self._members.others(), urgent=True)
        return news

    def forget(self, site: str) -> None:
        """A site was reaped."""
        self.state.forget(site)
        self.spread.forget(site)
        self._reconciler.forget(site)

    # ---------------------------------------------------------------- pages

    def take(self, sender: Sender, page: Page, now: float) -> None:
        """A page arrived."""
        owner = page.owner
        if owner not in (self._site, CLUSTER) and not self._lives(owner):
            self._met(sender, page)
            return
        before = self.state.owner(owner).generation
        outcome = self.state.take(page, now, sender.site)
        if outcome is Outcome.NEWS:
            if 0 < before < page.generation:
                self._members.restarted(owner)
                self._emit("restarted", owner, "")
            self._emit("updated", owner, page.key)
            self.spread.told(page, sender.site)
            if not page.hops:
                self.learnt()
        elif outcome is Outcome.DEFENDED:
            for key in self.state.keys(self._site):
                self.spread.publish(self._site, key, self._members.others(), urgent=True)
        elif outcome not in (Outcome.WAITING, Outcome.KNOWN):
            self._counters[outcome.value] += 1

    def introduce(self, site: str, source: str, now: float) -> None:
        """A claim of a site whose key we do not know: ask who told us for all that it knows, the key first."""
        if now >= self._strangers.get(site, float("-inf")) + STRANGER_S:
            if len(self._strangers) >= MAX_STRANGERS:
                self._strangers.clear()
            self._strangers[site] = now
            self._answer(source, [Want(name_hash(site))], now)

    def welcome(self, site: str, now: float) -> None:
        """A site was heard of: take the page that was here before the claim."""
        early = self._early.pop(site, None)
        if early is not None:
            self.take(*early, now)

    def _met(self, sender: Sender, page: Page) -> None:
        """A page of a site that is no member. Its key is learnt; the page itself waits for the claim behind it."""
        if page.key != IDENTITY or page.parts != 1 or self._proofs.knows(page.owner):
            return
        statement = Statement(page.owner, page.generation, page.key, page.version, page.data)
        if not self._proofs.entry_holds(statement, page.proof):
            self._counters[Forged.counter] += 1
            return
        if len(self._early) >= MAX_STRANGERS:
            self._early.clear()
        self._early[page.owner] = (sender, page)

    def _lives(self, site: str) -> bool:
        claim = self._members.claim(site)
        return claim is not None and claim.state in (ALIVE, SUSPECT)

    # ---------------------------------------------------------------- anti-entropy

    def print(self) -> bytes:
        """The hash of all that live members should agree on. Suspicion is left out: it is not lasting knowledge."""
        self._mark()
        return self._prints.whole()

    def touched(self, site: str) -> None:
        """Who lives at which incarnation, or what a site's versions are, has changed."""
        self.changes += 1
        self._dirty[site] = None

    def learnt(self) -> None:
        """An exchange taught us something."""
        self._reconciler.learnt()

    def reconcile(self, sender: Sender, source: str, now: float) -> bool:
        """Start an exchange with somebody who knows something else, unless it is too early for one. True if so."""
        opening = self._reconciler.start(sender.site, sender.fingerprint, now)
        self._answer(source, opening, now)
        return bool(opening)

    def on_buckets(self, source: str, message: Buckets, now: float) -> None:
        """Answer the opening of an exchange."""
        self._mark()
        self._answer(source, self._reconciler.on_buckets(message), now)

    def on_summary(self, source: str, message: Summary, now: float) -> None:
        """Answer rows."""
        self._mark()
        self._answer(source, self._reconciler.on_summary(message), now)

    def on_want(self, source: str, message: Want, now: float) -> None:
        """Tell all about some sites."""
        self._mark()
        self._answer(source, self._reconciler.on_want(message), now)

    def on_digest(self, source: str, message: Digest, now: float) -> None:
        """Send what is newer here."""
        self._answer(source, self._reconciler.on_digest(message), now)

    def _mark(self) -> None:
        """Bring the fingerprints up to date, a few sites at a time."""
        if not self._dirty:
            return
        dirty, self._dirty = self._dirty, {}
        for site in dirty:
            owner, claim = self.state.owner(site), self._members.claim(site)
            if site == CLUSTER:
                self._prints.set(site, mark(site, 1, owner.generation, owner.versions()))
            elif claim is None:
                self._prints.drop(site)
            elif claim.state in (ALIVE, SUSPECT) or site == self._site:
                self._prints.set(site, mark(site, claim.incarnation, owner.generation, owner.versions()))
            else:
                self._prints.set(site, None)

    def _answer(self, address: str, messages: list[Message], now: float) -> None:
        """Send what anti-entropy has to say: over a stream where it is much, else as datagrams within the budget."""
        packed = [pack_message(message) for message in messages]
        if self._post.serving:
            self._post.queue(address, *packed)
            return
        if sum(map(len, packed)) > STREAM_FROM_BYTES and self._post.ask(address, self._post.site(address), packed):
            return
        for message in packed:
            if not self._budget.take(len(message), now):
                self._counters["throttled"] += 1
                break
            self._post.queue(address, message)
