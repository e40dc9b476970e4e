"""Where what arrives goes: its head to membership, each message to the part that it is for.

Whatever a stranger can say has been parsed (`codec`) before it comes here; here it is weighed whether the sender said
it (`proof`), and whether to listen at all (`swim`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

from mesh.gossip.distances import Distances
from mesh.gossip.entries import Entries
from mesh.gossip.members import Claim
from mesh.gossip.messages import (
    Ack,
    Buckets,
    Digest,
    Message,
    Nack,
    Page,
    Ping,
    PingRequest,
    Rumour,
    Sender,
    Summary,
    Taken,
    Want,
)
from mesh.gossip.post import Post
from mesh.gossip.proof import Proofs
from mesh.gossip.sealing import Forged, Stale
from mesh.gossip.swim import Swim


class Inbox:
    """See the module."""

    def __init__(
        self,
        swim: Swim,
        entries: Entries,
        distances: Distances,
        *,
        post: Post,
        proofs: Proofs,
        counters: Counter[str],
        pull_gap_s: float,
    ) -> None:
        """`pull_gap_s`: least seconds between two anti-entropy exchanges that we start."""
        self._swim = swim
        self._entries = entries
        self._distances = distances
        self._post = post
        self._proofs = proofs
        self._counters = counters
        self._pull_gap_s = pull_gap_s
        self._pulled_s = -math.inf

    def take(self, sender: Sender, messages: list[Message], source: str, now: float, *, direct: bool = True) -> None:
        """Take what a datagram (`direct`) or a stream held. Raises Forged for a head that its site did not sign."""
        if not self._proofs.said(sender):
            raise Forged(f"{sender.site} did not say so")
        self._post.place(source, sender.site)
        if self._swim.hear(sender, source, now, direct=direct):
            pinged = False
            for message in messages:
                kind = type(message)
                pinged = pinged or kind is Ping
                self._handlers[kind](self, sender, source, message, now)
            if pinged and not (sender.left or self._swim.left):
                self._reconcile(sender, source, now)
        else:
            for message in messages:
                if type(message) is Taken:
                    self._swim.taken(sender, message, now)
                elif type(message) is Ping and sender.site == self._swim.site:
                    self._swim.namesake(sender, source)

    # ---------------------------------------------------------------- messages

    def _on_ping(self, sender: Sender, source: str, message: Ping, now: float) -> None:
        self._swim.ping(sender, source, message)

    def _on_ack(self, sender: Sender, source: str, message: Ack, now: float) -> None:
        rtt_s = self._swim.ack(sender, message, now)
        if rtt_s is not None:
            self._distances.answered(sender.site, message.where, rtt_s, now)

    def _on_nack(self, sender: Sender, source: str, message: Nack, now: float) -> None:
        self._swim.nack(sender, message)

    def _on_ping_request(self, sender: Sender, source: str, message: PingRequest, now: float) -> None:
        self._swim.ping_request(sender, source, message, now)

    def _on_rumour(self, sender: Sender, source: str, message: Rumour, now: float) -> None:
        if self._proofs.knows(message.claim.site):
            self._consider(message.claim, now, news=message.news)
        else:
            self._entries.introduce(message.claim.site, source, now)

    def _on_taken(self, sender: Sender, source: str, message: Taken, now: float) -> None:
        self._swim.taken(sender, message, now)

    def _on_buckets(self, sender: Sender, source: str, message: Buckets, now: float) -> None:
        self._entries.on_buckets(source, message, now)

    def _on_summary(self, sender: Sender, source: str, message: Summary, now: float) -> None:
        self._entries.on_summary(source, message, now)

    def _on_want(self, sender: Sender, source: str, message: Want, now: float) -> None:
        self._entries.on_want(source, message, now)

    def _on_digest(self, sender: Sender, source: str, message: Digest, now: float) -> None:
        self._entries.on_digest(source, message, now)

    def _on_page(self, sender: Sender, source: str, message: Page, now: float) -> None:
        self._entries.take(sender, message, now)

    _handlers: ClassVar[dict[type, Callable[[Inbox, Sender, str, Any, float], None]]] = {
        Ping: _on_ping,
        Ack: _on_ack,
        Nack: _on_nack,
        PingRequest: _on_ping_request,
        Rumour: _on_rumour,
        Buckets: _on_buckets,
        Summary: _on_summary,
        Want: _on_want,
        Digest: _on_digest,
        Page: _on_page,
        Taken: _on_taken,
    }

    def _consider(self, claim: Claim, now: float, *, news: bool) -> None:
        """Let membership weigh a claim, if its subject once said what it rests on."""
        if not self._proofs.holds(claim):
            self._counters[Forged.counter] += 1
            return
        held = self._swim.peers.get(claim.site)
        if held is not None and claim.incarnation < held.incarnation:
            self._counters[Stale.counter] += 1
        changes = self._entries.changes
        self._post.place(claim.address, claim.site)
        if news:
            self._swim.consider(claim, now)
        else:
            self._swim.learn(claim, now)
        self._entries.welcome(claim.site, now)
        if self._entries.changes != changes:
            self._entries.learnt()

    def _reconcile(self, sender: Sender, source: str, now: float) -> None:
        """Start an exchange with somebody who knows something else, unless we just had one."""
        if self._swim.silent or now - self._pulled_s < self._pull_gap_s:
            return
        if sender.fingerprint != self._entries.print() and self._entries.reconcile(sender, source, now):
            self._pulled_s = now
            self._counters["syncs"] += 1
