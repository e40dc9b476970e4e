"""One gossip peer without I/O: datagrams and the time go in, datagrams, the next wake-up and events come out.

Membership is `swim`, entries are `state`; this module puts both on the wire. Every datagram starts with the sender's
claim about itself and a fingerprint of everything it knows of live members (`fingerprint`). A ping whose fingerprint
differs from ours may start an anti-entropy exchange (`reconcile`); in the steady state that costs eight bytes a ping.
What is new (a claim, an entry of our own) does not wait for that: it is pushed to a few members at once (`spread`).

    core.start(now); loop: core.receive(data, source, now) | core.handle_timer(now at core.next_timer())
    after each call: send core.datagrams(now), carry out core.streams(), hand out core.events()

A stream is one request and one answer over something reliable: `streams` are ours, `serve_stream` answers another's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

from mesh.gossip.absent import Known
from mesh.gossip.codec import MAX_STREAM_MESSAGES, Codec, pack_message, pack_sender
from mesh.gossip.config import MAX_MEMBERS, GossipConfig
from mesh.gossip.coordinates import Coordinate
from mesh.gossip.distances import COORDINATES, LINKS, Distances, reaches
from mesh.gossip.fingerprint import Fingerprints, mark, name_hash
from mesh.gossip.links import LinkReport
from mesh.gossip.members import ALIVE, LEFT, Claim, Member, Reach
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
from mesh.gossip.proof import CLUSTER, IDENTITY, Proofs, Prover, Statement, Unproven
from mesh.gossip.reconcile import Budget, Reconciler
from mesh.gossip.rtt import Rtt
from mesh.gossip.sealing import Forged, Malformed, Sealer, Stale
from mesh.gossip.spread import Spread
from mesh.gossip.state import Outcome, State
from mesh.gossip.swim import Swim
from mesh.gossip.timers import Timer, Timers

#: Streams under way at most; the rest counts as failed at once.
MAX_STREAMS = 64
#: Addresses whose site is remembered.
MAX_PLACES = 4 * MAX_MEMBERS
#: An answer of anti-entropy from this size on goes over a stream, where there are streams.
STREAM_FROM_BYTES = 16 * 1024
#: Sites whose key is asked for at a time, and how soon again.
MAX_STRANGERS = 1024
STRANGER_S = 1.0


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


class Datagram(NamedTuple):
    """Bytes to be sent to "host:port"."""

    address: str
    data: bytes


class StreamRequest(NamedTuple):
    """Bytes to be asked of `site` at "host:port" over a reliable stream; the answer belongs to `token`."""

    address: str
    site: str
    data: bytes
    token: int


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
        self._proofs = Proofs(config.cluster, prover or Unproven())
        self._places: dict[str, str] = {}
        self._replies: list[Datagram] = []
        self._strangers: dict[str, float] = {}
        self._early: dict[str, tuple[Sender, str, Page]] = {}
        self._asking: list[StreamRequest] = []
        self._asked: dict[int, StreamRequest] = {}
        self._tokens = 0
        self._streaming = streaming
        self._timers = Timers(stall_s=self._t.stall_s, grace_s=self._t.grace_s)
        self._state = State(
            config.site,
            config.incarnation,
            sign=self._proofs.sign_entry,
            holds=self._proofs.entry_holds,
            touched=self._touched,
        )
        self._prints = Fingerprints()
        self._dirty: dict[str, None] = {config.site: None}
        self._touches = 0
        self._pulled_s = -math.inf
        self._reconciler = Reconciler(self._prints, self._state, claim=self._claim, gap_s=self._t.sync_gap_s)
        self._budget = Budget()
        self._serving = False
        self._spread = Spread(self._t.fanout, self._state.pages)
        self._events: list[Event] = []
        self._outbox: dict[str, list[bytes]] = {}
        self._flush: Timer | None = None
        self._flushed_s = -math.inf
        self._packed_head: tuple[object, bytes] = (None, b"")
        self._distances = Distances(config.site, config.rng)
        self._swim = Swim(
            config,
            self.address,
            self._timers,
            send=self._queue,
            emit=self._membership_changed,
            pack=pack_message,
            gone=self._forget,
            touched=self._touched,
            prove=self._proofs.prove,
            ask=self.ask,
            reaches=lambda helper, target: reaches(self._state.value(helper, LINKS), target),
            estimate_s=lambda site: self._distances.estimate_s(self._state.value(site, COORDINATES)),
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
                self._replies.append(Datagram(source, datagram.reply))
            if datagram.sender is not None:
                self._hear(datagram.sender, datagram.messages, source, now)
        except Malformed as error:
            self.counters[error.counter] += 1
            if error.reply is not None:
                self._replies.append(Datagram(source, error.reply))
            return
        self._push_soon(now)

    def _hear(self, sender: Sender, messages: list[Message], source: str, now: float, *, direct: bool = True) -> None:
        """Take what a datagram (`direct`) or a stream held. Raises Forged for a head that its site did not sign."""
        state = LEFT if sender.left else ALIVE
        if not self._proofs.holds(Claim(sender.site, sender.address, state, sender.incarnation, proof=sender.proof)):
            raise Forged(f"{sender.site} did not say so")
        self._note_place(source, sender.site)
        if self._swim.hear(sender, source, now, direct=direct):
            for message in messages:
                self._handlers[type(message)](self, sender, source, message, now)
            if any(type(message) is Ping for message in messages) and not (sender.left or self._swim.left):
                self._reconcile(sender, source, now)
        else:
            for message in messages:
                if type(message) is Taken:
                    self._swim.taken(sender, message, now)
                elif type(message) is Ping and sender.site == self.site:
                    self._swim.namesake(sender, source)

    def _note_place(self, address: str, site: str) -> None:
        """Remember who is where, for the sealer."""
        if self._places.get(address) != site:
            if len(self._places) >= MAX_PLACES:
                self._places.clear()
            self._places[address] = site

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
        if not self._outbox and not self._replies:
            return []
        outbox, self._outbox = self._outbox, {}
        sent, self._replies = self._replies, []
        if self._swim.silent:
            return []
        sender = self._head()
        room = self._codec.room_bytes(sender)

        def send(address: str, load: list[bytes]) -> None:
            site = self._places.get(address, "")
            sent.append(Datagram(address, self._codec.join(sender, load, address=address, site=site, now=now)))

        for address, messages in outbox.items():
            load: list[bytes] = []
            left = room
            for message in messages:
                if len(message) > left and load:
                    send(address, load)
                    load, left = [], room
                load.append(message)
                left -= len(message)
            claims = self._swim.rumours.take(left)
            load += claims
            load += self._spread.ride(left - sum(map(len, claims)))
            if load:
                send(address, load)
        self.counters["sent"] += len(sent)
        self.counters["sent_bytes"] += sum(len(datagram.data) for datagram in sent)
        return sent

    def _head(self) -> bytes:
        own = self._swim.own_claim()
        said = Sender(self.site, self.address, own.incarnation, self._swim.left, self._print(), own.proof)
        if self._packed_head[0] != said:
            self._packed_head = (said, pack_sender(said))
        return self._packed_head[1]

    def events(self) -> list[Event]:
        """What changed since the last call."""
        events, self._events = self._events, []
        return events

    # ---------------------------------------------------------------- streams

    def streams(self) -> list[StreamRequest]:
        """Requests to be made over reliable streams; give each answer, or its failure, to `stream_answered`."""
        asking, self._asking = self._asking, []
        return asking

    def serve_stream(self, data: bytes, source: str, now: float, site: str | None = None) -> bytes:
        """The answer to another's request. `source` is where it came from, `site` who provably asks (None: nobody did).

        Raises Malformed or one of its subclasses, after counting it.
        """
        self.counters["streams_served"] += 1
        try:
            request = self._codec.decode_stream(data, site)
            assert request.sender is not None
            # What is queued for the asker from here on is the answer; what others are sent meanwhile goes its own way.
            outbox, self._outbox = self._outbox, {}
            self._serving = True
            try:
                self._hear(request.sender, request.messages, request.sender.address, now, direct=False)
            finally:
                self._serving = False
                answers = self._outbox.pop(request.sender.address, [])
                for address, messages in self._outbox.items():
                    outbox.setdefault(address, []).extend(messages)
                self._outbox = outbox
        except Malformed as error:
            self.counters[error.counter] += 1
            raise
        self._push_soon(now)
        sender = self._head()
        return self._codec.join_stream(sender, _fitting(answers, self._codec.stream_room_bytes(sender)))

    def stream_answered(self, token: int, data: bytes | None, now: float) -> None:
        """The answer to one of our requests; None if there was none. Wrong answers are counted, nothing is raised."""
        asked = self._asked.pop(token, None)
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
            self._hear(answer.sender, answer.messages, asked.address, now, direct=False)
        except Malformed as error:
            self.counters[error.counter] += 1
            return
        self._push_soon(now)

    def ask(self, address: str, site: str, messages: Iterable[Message]) -> bool:
        """Queue a request over a stream. False if there are none, or too many under way."""
        return self._ask(address, site, [pack_message(message) for message in messages])

    def _ask(self, address: str, site: str, packed: list[bytes]) -> bool:
        if not self._streaming or len(self._asked) >= MAX_STREAMS or self._swim.silent:
            return False
        self._tokens += 1
        sender = self._head()
        load = _fitting(packed, self._codec.stream_room_bytes(sender))
        request = StreamRequest(address, site, self._codec.join_stream(sender, load), self._tokens)
        self._asked[request.token] = request
        self._asking.append(request)
        self.counters["streams_asked"] += 1
        return True

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
        if self._state.publish(key, value):
            self._spread.publish(self.site, key, self._others(), urgent=urgent)
            self._push_soon(now)

    def publish_cluster(self, key: str, value: dict[str, Any], version: int, proof: bytes, now: float) -> bool:
        """Install and spread an entry that the cluster's authority has signed. False if it is not news.

        It belongs to no member (its owner is "@cluster") and is never forgotten. Raises ValueError if the value is out
        of bounds or the proof is not the authority's.
        """
        news = self._state.publish_cluster(key, value, version, proof)
        if news:
            self._events.append(Event("updated", CLUSTER, key))
            self._spread.publish(CLUSTER, key, self._others(), urgent=True)
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

    def links(self) -> dict[str, LinkReport]:
        """What is known of the link to every live site."""
        return self._distances.reports(self._swim.live())

    def coordinate(self) -> Coordinate:
        """Where this site is, as `coordinates` has it."""
        return self._distances.coordinates.own()

    def transferred(self, site: str, size_bytes: int, seconds: float, now: float) -> None:
        """So many bytes reached `site` in so many seconds: the link's bandwidth is taken from such transfers."""
        self._distances.links.transferred(site, size_bytes, seconds, now)

    def bandwidth_probe(self, now: float) -> str | None:
        """A site to which a short transfer should be timed now (rarely), or None; answer with `transferred`."""
        return self._distances.links.to_probe(now)

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
        self._swim.ping_request(source, message, now)

    def _on_rumour(self, sender: Sender, source: str, message: Rumour, now: float) -> None:
        if self._proofs.knows(message.claim.site):
            self._consider(message.claim, now, news=message.news)
        else:
            self._introduce(message.claim.site, source, now)

    def _on_taken(self, sender: Sender, source: str, message: Taken, now: float) -> None:
        self._swim.taken(sender, message, now)

    def _on_buckets(self, sender: Sender, source: str, message: Buckets, now: float) -> None:
        self._marked()
        self._answer(source, self._reconciler.on_buckets(message), now)

    def _on_summary(self, sender: Sender, source: str, message: Summary, now: float) -> None:
        self._marked()
        self._answer(source, self._reconciler.on_summary(message), now)

    def _on_want(self, sender: Sender, source: str, message: Want, now: float) -> None:
        self._marked()
        self._answer(source, self._reconciler.on_want(message), now)

    def _on_digest(self, sender: Sender, source: str, message: Digest, now: float) -> None:
        self._answer(source, self._reconciler.on_digest(message), now)

    def _on_page(self, sender: Sender, source: str, message: Page, now: float) -> None:
        owner = message.owner
        if owner not in (self.site, CLUSTER):
            peer = self._swim.peers.get(owner)
            if peer is None or not peer.live:
                self._met(sender, source, message)
                return
        before = self._state.owner(owner).generation
        outcome = self._state.take(message, now, sender.site)
        if outcome is Outcome.NEWS:
            if 0 < before < message.generation:
                self._swim.restarted(owner)
                self._events.append(Event("restarted", owner))
            self._events.append(Event("updated", owner, message.key))
            if message.key == COORDINATES:
                self._distances.heard(owner, self._state.value(owner, COORDINATES))
            self._spread.told(message, sender.site)
            if not message.hops:
                self._reconciler.learnt()
        elif outcome is Outcome.DEFENDED:
            for key in self._state.keys(self.site):
                self._spread.publish(self.site, key, self._others(), urgent=True)
        elif outcome not in (Outcome.WAITING, Outcome.KNOWN):
            self.counters[outcome.value] += 1

    _handlers: ClassVar[dict[type, Callable[[GossipCore, Sender, str, Any, float], None]]] = {
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

    def _introduce(self, site: str, source: str, now: float) -> None:
        """A claim of a site whose key we do not know: ask who told us for all that it knows, the key first."""
        if now >= self._strangers.get(site, -math.inf) + STRANGER_S:
            if len(self._strangers) >= MAX_STRANGERS:
                self._strangers.clear()
            self._strangers[site] = now
            self._answer(source, [Want(name_hash(site))], now)

    def _met(self, sender: Sender, source: str, page: Page) -> None:
        """A page of a site that is no member. Its key is learnt; the page itself waits for the claim behind it."""
        if page.key != IDENTITY or page.parts != 1 or self._proofs.knows(page.owner):
            return
        statement = Statement(page.owner, page.generation, page.key, page.version, page.data)
        if not self._proofs.entry_holds(statement, page.proof):
            self.counters[Forged.counter] += 1
            return
        if len(self._early) >= MAX_STRANGERS:
            self._early.clear()
        self._early[page.owner] = (sender, source, page)

    def _consider(self, claim: Claim, now: float, *, news: bool) -> None:
        """Let membership weigh a claim, if its subject once said what it rests on."""
        if not self._proofs.holds(claim):
            self.counters[Forged.counter] += 1
            return
        held = self._swim.peers.get(claim.site)
        if held is not None and claim.incarnation < held.incarnation:
            self.counters[Stale.counter] += 1
        touches = self._touches
        self._note_place(claim.address, claim.site)
        if news:
            self._swim.consider(claim, now)
        else:
            self._swim.learn(claim, now)
        early = self._early.pop(claim.site, None)
        if early is not None:
            self._on_page(*early, now)
        if self._touches != touches:
            self._reconciler.learnt()

    # ---------------------------------------------------------------- anti-entropy

    def _print(self) -> bytes:
        """The hash of all that live members should agree on. Suspicion is left out: it is not lasting knowledge."""
        self._marked()
        return self._prints.whole()

    def _touched(self, site: str) -> None:
        """Who lives at which incarnation, or what a site's versions are, has changed."""
        self._touches += 1
        self._dirty[site] = None

    def _marked(self) -> None:
        """Bring the fingerprints up to date, a few sites at a time."""
        if not self._dirty:
            return
        dirty, self._dirty = self._dirty, {}
        for site in dirty:
            owner = self._state.owner(site)
            if site in (self.site, CLUSTER):
                incarnation = self._swim.incarnation if site == self.site else 1
            else:
                peer = self._swim.peers.get(site)
                if peer is None:
                    self._prints.drop(site)
                    continue
                if not peer.live:
                    self._prints.set(site, None)
                    continue
                incarnation = peer.incarnation
            self._prints.set(site, mark(site, incarnation, owner.generation, owner.versions()))

    def _claim(self, site: str) -> Claim | None:
        """What we say of a site."""
        if site == self.site:
            return self._swim.own_claim()
        peer = self._swim.peers.get(site)
        return None if peer is None else peer.claim()

    def _reconcile(self, sender: Sender, source: str, now: float) -> None:
        """Start an exchange with somebody who knows something else, unless we just had one."""
        if self._swim.silent or sender.fingerprint == self._print():
            return
        if now - self._pulled_s < self._t.push_pull_s:
            return
        opening = self._reconciler.start(sender.site, sender.fingerprint, now)
        if opening:
            self._pulled_s = now
            self.counters["syncs"] += 1
            self._answer(source, opening, now)

    def _answer(self, address: str, messages: list[Message], now: float) -> None:
        """Send what anti-entropy has to say: over a stream where it is much, else as datagrams within the budget."""
        if not messages:
            return
        packed = [pack_message(message) for message in messages]
        size_bytes = sum(map(len, packed))
        if self._serving:
            self._outbox.setdefault(address, []).extend(packed)
            return
        if size_bytes > STREAM_FROM_BYTES and self._ask(address, self._places.get(address, ""), packed):
            return
        queue = self._outbox.setdefault(address, [])
        for message in packed:
            if not self._budget.take(len(message), now):
                self.counters["throttled"] += 1
                break
            queue.append(message)

    # ---------------------------------------------------------------- spreading news

    def _others(self) -> int:
        """Other live members."""
        return sum(1 for peer in self._swim.peers.values() if peer.live)

    def _push_soon(self, now: float) -> None:
        pending = self._spread.pushing or self._swim.rumours.pushing
        if pending and (self._flush is None or self._flush.cancelled):
            self._flush = self._timers.at(max(now, self._flushed_s + self._t.push_gap_s), self._push)

    def _push(self, now: float) -> None:
        """Send what is new to a few members, without waiting for a probe to ride on."""
        self._flushed_s = now
        self._flush = None
        live = self._swim.live()
        targets = self._rng.sample(live, min(self._t.fanout, len(live)))
        news = self._spread.push() if targets else []
        for target in targets:
            pushed = self._outbox.setdefault(target.address, [])  # even an empty load carries claims
            for owner, origin, pages in news:
                if target.site not in (owner, origin):
                    pushed.extend(pages)
        self._push_soon(now)

    def _queue(self, address: str, message: Message) -> None:
        if type(message) is Ack:
            message = Ack(message.seq, self._distances.where())
        self._outbox.setdefault(address, []).append(pack_message(message))

    # ---------------------------------------------------------------- membership

    def _membership_changed(self, kind: str, site: str) -> None:
        self._events.append(Event(kind, site))

    def _forget(self, site: str) -> None:
        self._state.forget(site)
        self._distances.forget(site)
        self._spread.forget(site)
        self._reconciler.forget(site)

    def _publish_distances(self, now: float) -> None:
        """Tell the mesh what we measure and where we are, when it has changed enough to matter."""
        others = self._others()
        self._timers.at(now + self._distances.look_gap_s(others, self._t.links_s), self._publish_distances)
        for key, value in self._distances.news(self._swim.live(), now):
            if self._state.publish(key, value):
                self._spread.publish(self.site, key, others, urgent=False)
                self._events.append(Event("updated", self.site, key))


def _fitting(packed: list[bytes], room_bytes: int) -> list[bytes]:
    """As many of the first messages as go into one stream."""
    fitting: list[bytes] = []
    for message in packed[:MAX_STREAM_MESSAGES]:
        room_bytes -= len(message)
        if room_bytes < 0:
            break
        fitting.append(message)
    return fitting
