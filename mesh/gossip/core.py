"""One gossip peer without I/O: datagrams and the time go in, datagrams, the next wake-up and events come out.

Membership is `swim`, entries are `state`; this module puts both on the wire. Every datagram starts with the sender's
claim about itself and a fingerprint of everything it knows of live members: (site, incarnation, entry versions). A ping
whose fingerprint differs from ours starts an anti-entropy exchange: we send a digest of every live member, the other
answers with what is newer and with its own digests, we answer those. In the steady state that costs eight bytes a ping.
What is new (a claim, an entry of our own) does not wait for that: it is pushed to a few members at once.

    core.start(now); loop: core.receive(data, source, now) | core.handle_timer(now at core.next_timer())
    after each call: send core.datagrams(now), carry out core.streams(), hand out core.events()

A stream is one request and one answer over something reliable: `streams` are ours, `serve_stream` answers another's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import Any, ClassVar, NamedTuple

import msgpack

from mesh.gossip.codec import FINGERPRINT_BYTES, MAX_STREAM_MESSAGES, Codec, pack_message, pack_sender
from mesh.gossip.config import MAX_MEMBERS, GossipConfig
from mesh.gossip.links import Links
from mesh.gossip.members import ALIVE, LEFT, Claim, Member
from mesh.gossip.messages import (
    Ack,
    Digest,
    Message,
    Nack,
    Page,
    Ping,
    PingRequest,
    Rumour,
    Sender,
    SyncRequest,
    Taken,
)
from mesh.gossip.proof import Proofs, Prover, Unproven
from mesh.gossip.rtt import Rtt
from mesh.gossip.sealing import Forged, Malformed, Sealer
from mesh.gossip.state import State
from mesh.gossip.swim import Swim
from mesh.gossip.timers import Timer, Timers

#: Pages sent in answer to one datagram of digests; the rest follows with the next exchange.
MAX_SYNC_PAGES = 64
#: An exchange that changed nothing on either side (two sites claim one name) is repeated less and less often.
MAX_SYNC_GAP_S = 5.0
#: Least time between two exchanges that we start, per member.
SYNC_PACE_S = 0.005
#: Streams under way at most; the rest counts as failed at once.
MAX_STREAMS = 64
#: Addresses whose site is remembered.
MAX_PLACES = 4 * MAX_MEMBERS
#: The entry that tells the mesh what this peer's probes measure.
LINKS = "links"


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


class _Sync(NamedTuple):
    """The last exchange with a peer: when, the fingerprints that differed (theirs, ours), how often in a row."""

    when_s: float
    prints: tuple[bytes, bytes]
    repeats: int


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
        self._asking: list[StreamRequest] = []
        self._asked: dict[int, StreamRequest] = {}
        self._tokens = 0
        self._streaming = streaming
        self._timers = Timers(stall_s=self._t.stall_s, grace_s=self._t.grace_s)
        self._state = State(config.site, config.incarnation)
        self._events: list[Event] = []
        self._outbox: dict[str, list[bytes]] = {}
        self._hot: dict[tuple[str, str], int] = {}
        self._flush: Timer | None = None
        self._flushed_s = -math.inf
        self._syncs: dict[str, _Sync] = {}
        self._synced_s = -math.inf
        self._links = Links()
        self._budget = 0
        self._touches = 0
        self._fingerprint: tuple[tuple[int, int], bytes] = ((-1, -1), b"")
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
        )

    # ---------------------------------------------------------------- driving

    def start(self, now: float) -> None:
        """Begin. Call once, first."""
        self._swim.start(now, self._seeds)
        self._timers.at(now + self._t.links_first_s, self._publish_links)

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
            return
        self._push_soon(now)

    def _hear(self, sender: Sender, messages: list[Message], source: str, now: float) -> None:
        """Take what a datagram or a stream held. Raises Forged for a head that its site did not sign."""
        state = LEFT if sender.left else ALIVE
        if not self._proofs.holds(Claim(sender.site, sender.address, state, sender.incarnation, proof=sender.proof)):
            raise Forged(f"{sender.site} did not say so")
        self._note_place(source, sender.site)
        self._budget = MAX_SYNC_PAGES
        if self._swim.hear(sender, source, now):
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
            load += self._swim.rumours.take(left)
            if load:
                send(address, load)
        self.counters["sent"] += len(sent)
        self.counters["sent_bytes"] += sum(len(datagram.data) for datagram in sent)
        return sent

    def _head(self) -> bytes:
        own = self._swim.own_claim()
        return pack_sender(Sender(self.site, self.address, own.incarnation, self._swim.left, self._print(), own.proof))

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
            try:
                self._hear(request.sender, request.messages, request.sender.address, now)
            finally:
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
            self._hear(answer.sender, answer.messages, asked.address, now)
        except Malformed as error:
            self.counters[error.counter] += 1
            return
        self._push_soon(now)

    def ask(self, address: str, site: str, messages: Iterable[Message]) -> bool:
        """Queue a request over a stream. False if there are none, or too many under way."""
        if not self._streaming or len(self._asked) >= MAX_STREAMS or self._swim.silent:
            return False
        self._tokens += 1
        sender = self._head()
        load = _fitting([pack_message(message) for message in messages], self._codec.stream_room_bytes(sender))
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

    def members(self) -> tuple[Member, ...]:
        """Everybody known, ourselves included, sorted by name."""
        return self._swim.members()

    def publish(self, key: str, value: dict[str, Any], now: float) -> None:
        """Write an entry of our own and spread it. Raises ValueError if the value is out of bounds."""
        if self._state.publish(key, value):
            self._spread(self.site, key)
            self._push_soon(now)

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

    # ---------------------------------------------------------------- messages

    def _on_ping(self, sender: Sender, source: str, message: Ping, now: float) -> None:
        self._swim.ping(sender, source, message)

    def _on_ack(self, sender: Sender, source: str, message: Ack, now: float) -> None:
        self._swim.ack(sender, message, now)

    def _on_nack(self, sender: Sender, source: str, message: Nack, now: float) -> None:
        self._swim.nack(sender, message)

    def _on_ping_request(self, sender: Sender, source: str, message: PingRequest, now: float) -> None:
        self._swim.ping_request(source, message, now)

    def _on_rumour(self, sender: Sender, source: str, message: Rumour, now: float) -> None:
        self._consider(message.claim, now)

    def _on_taken(self, sender: Sender, source: str, message: Taken, now: float) -> None:
        self._swim.taken(sender, message, now)

    def _on_digest(self, sender: Sender, source: str, message: Digest, now: float) -> None:
        claim = message.claim
        if not self._consider(claim, now):
            return
        if claim.site == self.site:
            if self._state.defend(message.generation, message.versions):
                for key in self._state.keys(self.site):
                    self._spread(self.site, key)
        else:
            peer = self._swim.peers.get(claim.site)
            if peer is not None and peer.claim().beats(claim):
                self._queue(source, Rumour(peer.claim()))
            if peer is None or not peer.live:
                return
        for key in self._state.newer_than(claim.site, message.generation, message.versions):
            if self._budget <= 0:
                break
            for page in self._state.pages(claim.site, key):
                self._budget -= 1
                self._queue(source, page)

    def _on_sync_request(self, sender: Sender, source: str, message: SyncRequest, now: float) -> None:
        self._send_digests(source)

    def _on_page(self, sender: Sender, source: str, message: Page, now: float) -> None:
        peer = self._swim.peers.get(message.owner)
        if peer is None or not peer.live:
            return
        before, rejected = self._state.owner(message.owner).generation, self._state.rejected
        if self._state.take(message, now):
            if 0 < before < message.generation:
                self._events.append(Event("restarted", message.owner))
            self._events.append(Event("updated", message.owner, message.key))
            self._spread(message.owner, message.key)
        self.counters["malformed"] += self._state.rejected - rejected

    _handlers: ClassVar[dict[type, Callable[[GossipCore, Sender, str, Any, float], None]]] = {
        Ping: _on_ping,
        Ack: _on_ack,
        Nack: _on_nack,
        PingRequest: _on_ping_request,
        Rumour: _on_rumour,
        Digest: _on_digest,
        SyncRequest: _on_sync_request,
        Page: _on_page,
        Taken: _on_taken,
    }

    def _consider(self, claim: Claim, now: float) -> bool:
        """Let membership weigh a claim, if its subject once said what it rests on."""
        if not self._proofs.holds(claim):
            self.counters[Forged.counter] += 1
            return False
        self._note_place(claim.address, claim.site)
        self._swim.consider(claim, now)
        return True

    # ---------------------------------------------------------------- anti-entropy

    def _print(self) -> bytes:
        """A digest of all that live members should agree on. Suspicion is left out: it is not lasting knowledge."""
        known_at = (self._touches, self._state.changes)
        if self._fingerprint[0] != known_at:
            own = self._swim.own_claim()
            live = [(own.site, own.incarnation)] + [(peer.site, peer.incarnation) for peer in self._swim.live()]
            known = []
            for site, incarnation in sorted(live):
                owner = self._state.owner(site)
                known.append([site, incarnation, owner.generation, sorted(owner.versions().items())])
            digest = blake2b(msgpack.packb(known), digest_size=FINGERPRINT_BYTES).digest()
            self._fingerprint = (known_at, digest)
        return self._fingerprint[1]

    def _reconcile(self, sender: Sender, source: str, now: float) -> None:
        """Start an exchange with somebody who knows something else, unless we just had one."""
        if sender.fingerprint == self._print() or self._swim.silent:
            return
        # Every exchange names all members, so the more there are, the fewer we start.
        if now - self._synced_s < SYNC_PACE_S * len(self._swim.peers):
            return
        prints = (sender.fingerprint, self._print())
        last = self._syncs.get(sender.site)
        repeats = last.repeats + 1 if last is not None and last.prints == prints else 0
        if last is not None and now - last.when_s < min(self._t.sync_gap_s * 2**repeats, MAX_SYNC_GAP_S):
            return
        self._syncs[sender.site] = _Sync(now, prints, repeats)
        self._synced_s = now
        self.counters["syncs"] += 1
        self._send_digests(source)
        self._queue(source, SyncRequest())

    def _send_digests(self, address: str) -> None:
        own = [] if self._swim.left else [self._swim.own_claim()]
        claims = own + [peer.claim() for peer in self._swim.live()]
        for claim in claims:
            owner = self._state.owner(claim.site)
            self._queue(address, Digest(claim, owner.generation, owner.versions()))

    # ---------------------------------------------------------------- spreading news

    def _spread(self, owner: str, key: str) -> None:
        """Mark an entry as news. Where the owner reaches everybody itself, only the owner pushes it."""
        others = len(self._swim.live())
        if owner == self.site:
            self._hot[owner, key] = 1 if others <= self._t.fanout else math.ceil(math.log10(others + 2))
        elif others > self._t.fanout:
            self._hot[owner, key] = 1

    def _push_soon(self, now: float) -> None:
        pending = self._hot or self._swim.rumours.pushing
        if pending and (self._flush is None or self._flush.cancelled):
            self._flush = self._timers.at(max(now, self._flushed_s + self._t.push_gap_s), self._push)

    def _push(self, now: float) -> None:
        """Send what is new to a few members, without waiting for a probe to ride on."""
        self._flushed_s = now
        self._flush = None
        live = self._swim.live()
        targets = self._rng.sample(live, min(self._t.fanout, len(live)))
        for target in targets:
            pushed = self._outbox.setdefault(target.address, [])  # even an empty load carries claims
            for owner, key in self._hot:
                if owner != target.site:
                    pushed.extend(pack_message(page) for page in self._state.pages(owner, key))
        self._swim.rumours.pushed()
        self._hot = {place: rounds - 1 for place, rounds in self._hot.items() if rounds > 1 and live}
        self._push_soon(now)

    def _queue(self, address: str, message: Message) -> None:
        self._outbox.setdefault(address, []).append(pack_message(message))

    # ---------------------------------------------------------------- membership

    def _touched(self, site: str) -> None:
        self._touches += 1

    def _membership_changed(self, kind: str, site: str) -> None:
        self._events.append(Event(kind, site))

    def _forget(self, site: str) -> None:
        self._state.forget(site)
        self._syncs.pop(site, None)

    def _publish_links(self, now: float) -> None:
        """Tell the mesh what we measure, when it has changed enough to matter."""
        self._timers.at(now + self._t.links_s, self._publish_links)
        links = self._links.changed(self.rtts())
        if links is not None and self._state.publish(LINKS, links):
            self._spread(self.site, LINKS)
            self._events.append(Event("updated", self.site, LINKS))


def _fitting(packed: list[bytes], room_bytes: int) -> list[bytes]:
    """As many of the first messages as go into one stream."""
    fitting: list[bytes] = []
    for message in packed[:MAX_STREAM_MESSAGES]:
        room_bytes -= len(message)
        if room_bytes < 0:
            break
        fitting.append(message)
    return fitting
