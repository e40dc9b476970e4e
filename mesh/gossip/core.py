"""One gossip peer without I/O: datagrams and the time go in, datagrams, the next wake-up and events come out.

Membership is `swim`, what sites publish is `entries`; this module puts both on the wire, through `post`. Every datagram
starts with the sender's claim about itself and a fingerprint of everything it knows of live members (`fingerprint`). A
ping whose fingerprint differs from ours may start an anti-entropy exchange (`reconcile`); in the steady state that
costs eight bytes a ping. What is new (a claim, an entry) does not wait for that: it is pushed to a few (`spread`).

    core.start(now); loop: core.receive(data, source, now) | core.handle_timer(now at core.next_timer())
    after each call: send core.datagrams(now), carry out core.streams(), hand out core.events()

A stream is one request and one answer over something reliable: `streams` are ours, `serve_stream` answers another's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from mesh.gossip.absent import Known
from mesh.gossip.codec import Codec, pack_message, pack_sender
from mesh.gossip.config import GossipConfig
from mesh.gossip.coordinates import Coordinate
from mesh.gossip.distances import COORDINATES, LINKS, Distances, reaches
from mesh.gossip.entries import Entries, Members
from mesh.gossip.inbox import Inbox
from mesh.gossip.links import LinkReport
from mesh.gossip.members import Claim, Member, Reach
from mesh.gossip.messages import Ack, Message, Sender
from mesh.gossip.post import Datagram, Post, StreamRequest
from mesh.gossip.proof import Proofs, Prover, Unproven
from mesh.gossip.rtt import Rtt
from mesh.gossip.sealing import Forged, Malformed, Sealer
from mesh.gossip.state import State
from mesh.gossip.swim import Swim
from mesh.gossip.timers import Timer, Timers

__all__ = ["Datagram", "Event", "GossipCore", "StreamRequest"]


class Event(NamedTuple):
    """Something changed. `kind` is one of:

    joined, suspect, refuted, dead, left   membership of `site`
    restarted                              `site` is a new process; what its old one held is gone
    updated                                `site` published another value under `key`
    conflict                               another living peer uses our own name
    """

    kind: str
    site: str
    key: str = ""


class GossipCore:
    """See the module. Not thread safe; every method takes the time in seconds of one monotonic clock."""

    def __init__(
        self,
        config: GossipConfig,
        address: str | None = None,
        sealer: Sealer | None = None,
        prover: Prover | None = None,
        *,
        streaming: bool = False,
    ) -> None:
        """`address` is the one really bound, where it differs from the configured one.

        `streaming`: whoever runs this core carries out its `streams`. Otherwise it has datagrams only.
        """
        self.site = config.site
        self.address = config.advertise or address or config.address
        self.counters: Counter[str] = Counter()
        self._t = config.timing
        self._rng = config.rng
        self._seeds = tuple(config.seeds)
        self._codec = Codec(config.cluster, sealer)
        self._post = Post(self._codec, self.counters, head=self._head, streaming=streaming)
        self._proofs = Proofs(config.cluster, prover or Unproven())
        self._timers = Timers(stall_s=self._t.stall_s, grace_s=self._t.grace_s)
        self._state = State(
            config.site,
            config.incarnation,
            sign=self._proofs.sign_entry,
            holds=self._proofs.entry_holds,
            touched=self._touched,
        )
        self._entries = Entries(
            self._state,
            self._post,
            self._proofs,
            Members(self._claim, self._others, self._restarted),
            self.counters,
            emit=self._emit,
            fanout=self._t.fanout,
            gap_s=self._t.sync_gap_s,
        )
        self._events: list[Event] = []
        self._flush: Timer | None = None
        self._flushed_s = -math.inf
        self._packed_head: tuple[object, bytes] = (None, b"")
        self._distances = Distances(config.site, config.rng)
        self._swim = Swim(
            config,
            self.address,
            self._timers,
            send=self._queue,
            emit=self._emit,
            pack=pack_message,
            gone=self._forget,
            touched=self._touched,
            prove=self._proofs.prove,
            ask=self.ask,
            reaches=lambda helper, target: reaches(self._state.value(helper, LINKS), target),
            estimate_s=lambda site: self._distances.estimate_s(self._state.value(site, COORDINATES)),
        )
        self._inbox = Inbox(
            self._swim,
            self._entries,
            self._distances,
            post=self._post,
            proofs=self._proofs,
            counters=self.counters,
            pull_gap_s=self._t.push_pull_s,
        )

    # ---------------------------------------------------------------- driving

    def start(self, now: float) -> None:
        """Begin. Call once, first."""
        self._swim.start(now, self._seeds)
        self._timers.at(now + self._t.links_first_s, self._publish_distances)

    def receive(self, data: bytes, source: str, now: float) -> None:
        """Take a datagram from "host:port". Whatever is wrong with it is counted in `counters`; nothing is raised."""
        self.counters["received"] += 1
        try:
            datagram = self._codec.decode(data, source=source, now=now)
            if datagram.reply is not None:
                self._post.reply(source, datagram.reply)
            if datagram.sender is not None:
                self._inbox.take(datagram.sender, datagram.messages, source, now)
        except Malformed as error:
            self.counters[error.counter] += 1
            if error.reply is not None:
                self._post.reply(source, error.reply)
            return
        self._push_soon(now)

    def next_timer(self) -> float | None:
        """When `handle_timer` wants to be called, or None."""
        return self._timers.next_s()

    def handle_timer(self, now: float) -> None:
        """Run what is due. Give `receive` what has arrived first: an answer must count before its deadline does."""
        if self._timers.run(now):
            self.counters["stalls"] += 1
        self._push_soon(now)

    def datagrams(self, now: float) -> list[Datagram]:
        """What is to be sent now. Messages to one address share datagrams; claims that still travel fill them up."""
        if self._swim.silent:
            self._post.discard()
            return []
        return self._post.datagrams(now, self._ride)

    def _ride(self, room_bytes: int) -> list[bytes]:
        claims = self._swim.rumours.take(room_bytes)
        return claims + self._entries.spread.ride(room_bytes - sum(map(len, claims)))

    def _head(self) -> bytes:
        own = self._swim.own_claim()
        said = (own, self._entries.print())
        if self._packed_head[0] != said:
            sender = Sender(self.site, self.address, own.incarnation, self._swim.left, said[1], own.proof)
            self._packed_head = (said, pack_sender(sender))
        return self._packed_head[1]

    def events(self) -> list[Event]:
        """What changed since the last call."""
        events, self._events = self._events, []
        return events

    # ---------------------------------------------------------------- streams

    def streams(self) -> list[StreamRequest]:
        """Requests to be made over reliable streams; give each answer, or its failure, to `stream_answered`."""
        return self._post.streams()

    def serve_stream(self, data: bytes, source: str, now: float, site: str | None = None) -> bytes:
        """The answer to another's request. `source` is where it came from, `site` who provably asks (None: nobody did).

        Raises Malformed or one of its subclasses, after counting it.
        """
        self.counters["streams_served"] += 1
        try:
            request = self._codec.decode_stream(data, site)
            assert request.sender is not None
            answers: list[bytes] = []
            asker = request.sender.address
            with self._post.answering(asker, answers):
                self._inbox.take(request.sender, request.messages, asker, now, direct=False)
        except Malformed as error:
            self.counters[error.counter] += 1
            raise
        self._push_soon(now)
        return self._post.answer(answers)

    def stream_answered(self, token: int, data: bytes | None, now: float) -> None:
        """The answer to one of our requests; None if there was none. Wrong answers are counted, nothing is raised."""
        asked = self._post.asked(token)
        if asked is None:
            return
        if data is None:
            self.counters["streams_failed"] += 1
            return
        try:
            answer = self._codec.decode_stream(data)
            assert answer.sender is not None
            if asked.site not in ("", answer.sender.site):
                raise Forged(f"{answer.sender.site} answers for {asked.site}")
            self._inbox.take(answer.sender, answer.messages, asked.address, now, direct=False)
        except Malformed as error:
            self.counters[error.counter] += 1
            return
        self._push_soon(now)

    def ask(self, address: str, site: str, messages: Iterable[Message]) -> bool:
        """Queue a request over a stream. False if there are none, or too many under way."""
        packed = [pack_message(message) for message in messages]
        return not self._swim.silent and self._post.ask(address, site, packed)

    # ---------------------------------------------------------------- asking and telling

    @property
    def contacted(self) -> bool:
        """Whether any other member has been in direct touch."""
        return self._swim.contacted

    @property
    def taken_by(self) -> str | None:
        """The address of the living peer that has our name, once this peer has given way to it. Final."""
        return self._swim.taken_by

    @property
    def left(self) -> bool:
        """Whether we have left and every live member knows."""
        return self._swim.left and self._swim.farewells == 0

    def join(self, addresses: Iterable[str], now: float) -> None:
        """Call these addresses, with back-off, until somebody answers."""
        self._swim.join(addresses, now)

    def leave(self, now: float) -> None:
        """Say farewell. Final. Done when `left`."""
        self._swim.leave(now)

    def remember(self, known: Iterable[Known], now: float) -> None:
        """Call whom an earlier start of this site knew, until they answer. Call once, at the start."""
        self._swim.remember(known, now)
        self._touched(self.site)

    def known(self) -> list[Known]:
        """Whom to remember over a restart: everybody, ourselves and the forgotten included, sorted by name."""
        return self._swim.known()

    def reach(self) -> dict[str, Reach]:
        """Whether the direct path to every live site works, each way, as far as we can tell. Not to be changed."""
        return {peer.site: peer.reach for peer in self._swim.live()}

    def members(self) -> tuple[Member, ...]:
        """Everybody known, ourselves included, sorted by name."""
        return self._swim.members()

    def publish(self, key: str, value: dict[str, Any], now: float, *, urgent: bool = True) -> None:
        """Write an entry of our own and spread it. What is not urgent is left to anti-entropy in all but tiny meshes.

        Raises ValueError if the value is out of bounds.
        """
        if self._entries.publish(key, value, urgent=urgent):
            self._push_soon(now)

    def publish_cluster(self, key: str, value: dict[str, Any], version: int, proof: bytes, now: float) -> bool:
        """Install and spread an entry that the cluster's authority has signed. False if it is not news.

        It belongs to no member (its owner is "@cluster") and is never forgotten. Raises ValueError if the value is out
        of bounds or the proof is not the authority's.
        """
        news = self._entries.publish_cluster(key, value, version, proof)
        self._push_soon(now)
        return news

    def entry(self, site: str, key: str) -> dict[str, Any] | None:
        """What `site` last published under `key`, also after its death until it is forgotten; or None. A fresh copy."""
        return self._state.value(site, key)

    def entries(self, key: str) -> dict[str, dict[str, Any]]:
        """What every live site has published under `key`, ourselves included. Fresh copies."""
        sites = sorted([self.site, *(peer.site for peer in self._swim.live())])
        values = {site: self._state.value(site, key) for site in sites}
        return {site: value for site, value in values.items() if value is not None}

    def rtts(self) -> dict[str, Rtt]:
        """What probes measured to every live site that has answered one."""
        summaries = {peer.site: peer.rtt.summary() for peer in self._swim.live()}
        return {site: summary for site, summary in summaries.items() if summary is not None}

    def links(self, now: float) -> dict[str, LinkReport]:
        """What is known of the link to every live site."""
        return self._distances.reports(self._swim.live(), now)

    def coordinate(self) -> Coordinate:
        """Where this site is, as `coordinates` has it."""
        return self._distances.coordinates.own()

    def transferred(self, site: str, size_bytes: int, seconds: float, now: float) -> None:
        """So many bytes reached `site` in so many seconds: the link's bandwidth is taken from such transfers."""
        self._distances.links.transferred(site, size_bytes, seconds, now)

    def bandwidth_probe(self, now: float) -> str | None:
        """A site to which a short transfer should be timed now (rarely), or None; answer with `transferred`."""
        return self._distances.links.to_probe(now)

    def probe_failed(self, site: str, now: float) -> None:
        """The transfer that `bandwidth_probe` asked for came to nothing."""
        self._distances.links.probe_failed(site, now)

    def chose(self, site: str, transport: str | None) -> None:
        """Which transport proved best to `site`."""
        self._distances.links.chose(site, transport)

    # ---------------------------------------------------------------- anti-entropy

    def _touched(self, site: str) -> None:
        """Who lives at which incarnation, or what a site's versions are, has changed."""
        self._entries.touched(site)

    def _claim(self, site: str) -> Claim | None:
        """What we say of a site."""
        if site == self.site:
            return self._swim.own_claim()
        peer = self._swim.peers.get(site)
        return None if peer is None else peer.claim()

    # ---------------------------------------------------------------- spreading news

    def _others(self) -> int:
        """Other live members."""
        return len(self._swim.live())

    def _push_soon(self, now: float) -> None:
        pending = self._entries.spread.pushing or self._swim.rumours.pushing
        if pending and (self._flush is None or self._flush.cancelled):
            self._flush = self._timers.at(max(now, self._flushed_s + self._t.push_gap_s), self._push)

    def _push(self, now: float) -> None:
        """Send what is new to a few members, without waiting for a probe to ride on."""
        self._flushed_s = now
        self._flush = None
        live = self._swim.live()
        targets = self._rng.sample(live, min(self._t.fanout, len(live)))
        news = self._entries.spread.push() if targets else []
        for target in targets:
            self._post.queue(target.address)  # also without news, for the claims that travel
            for owner, origin, pages in news:
                if target.site not in (owner, origin):
                    self._post.queue(target.address, *pages)
        self._push_soon(now)

    def _queue(self, address: str, message: Message) -> None:
        if type(message) is Ack:
            message = Ack(message.seq, self._distances.where())
        self._post.queue(address, pack_message(message))

    # ---------------------------------------------------------------- membership

    def _emit(self, kind: str, site: str, key: str = "") -> None:
        if (kind, key) == ("updated", COORDINATES) and site != self.site:
            self._distances.heard(site, self._state.value(site, COORDINATES))
        self._events.append(Event(kind, site, key))

    def _restarted(self, site: str) -> None:
        self._swim.restarted(site)

    def _forget(self, site: str) -> None:
        self._entries.forget(site)
        self._distances.forget(site)

    def _publish_distances(self, now: float) -> None:
        """Tell the mesh what we measure and where we are, when it has changed enough to matter."""
        self._timers.at(now + self._distances.look_gap_s(self._others(), self._t.links_s), self._publish_distances)
        for key, value in self._distances.news(self._swim.live(), now, self._silent):
            if self._entries.publish(key, value, urgent=False):
                self._emit("updated", self.site, key)

    def _silent(self, key: str) -> int:
        """Live sites that have not published anything under `key`, ourselves included."""
        own = key not in self._state.owner(self.site).entries
        return own + sum(key not in self._state.owner(peer.site).entries for peer in self._swim.live())
