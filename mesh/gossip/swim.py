"""Membership by SWIM, with Lifeguard's local health and timeouts that follow the measured path.

Sans-I/O: the owner of a `Swim` feeds it what arrived and the time, runs its timers, and sends what it says.

Theory of operation. Every tick one other member is pinged, round-robin over a reshuffled list. Silence beyond the
direct timeout of that pair brings in three helpers (and a second direct ping); silence of all makes the target a
*suspect*, which is told at once to everybody. Who hears of a suspicion checks for itself; independent accusers shorten
the time left to the suspect, which is pinged all the while with the accusation in the same datagram, so that it can
refute by raising its incarnation. Then it is *dead*; the dead are called with back-off for an hour, because both halves
of a partition think the other dead and somebody has to find out. *left* is a farewell and is not called.

A claim wins by (incarnation, state); see `Claim.beats`. What a site says of itself stands at the head of a datagram.
A site's address changes only when its old address stays silent: a name that two living processes use stays with the
first (`Taken` goes to the second). Constants: `config.Timing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mesh.gossip import config
from mesh.gossip.members import ALIVE, DEAD, LEFT, SUSPECT, Claim, Member, Peer, Probe
from mesh.gossip.messages import Ack, Message, Nack, Ping, PingRequest, Rumour, Sender, Taken
from mesh.gossip.rumours import Rumours
from mesh.gossip.suspicion import Suspicion
from mesh.gossip.timers import Timer, Timers

#: Lifeguard allows 7; an eightfold wait is no use to a job that waits for its stage, and a small mesh refutes quickly.
MAX_HEALTH = 3
#: Sequence numbers remembered, and for how long: beyond the slowest round trip that counts.
MAX_PENDING = 4096
PENDING_S = 10.0
#: A helper says that it heard nothing at this share of the budget, so that its word arrives in time (Swift's SWIM).
NACK_SHARE = 0.8
#: A raised incarnation is told at most this often, so that false accusations cannot make a site flood the mesh.
REFUTE_GAP_S = 0.05
#: A process that was told that its name is taken gives way while it is this new; later it is the one that was there.
NEWCOMER_S = 10.0
#: After a site answered for its name, other claims to it are not looked into for so long.
CONTEST_GAP_S = 5.0


class Waiting(NamedTuple):
    """What an answer to one of our pings means."""

    site: str
    address: str
    sent_s: float
    why: Literal["probe", "helper", "plain", "seed", "relay", "contest", "farewell"]
    probe: Probe | None = None
    relay: tuple[str, int] | None = None
    claimant: str | None = None


@dataclass(slots=True)
class Seed:
    """An address to join through; `site` is who answered there."""

    address: str
    delay_s: float
    site: str = ""
    timer: Timer | None = None


class Swim:
    """The members of the mesh as one peer sees them."""

    def __init__(
        self,
        settings: config.GossipConfig,
        address: str,
        timers: Timers,
        *,
        send: Callable[[str, Message], None],
        emit: Callable[[str, str], None],
        pack: Callable[[Message], bytes],
        gone: Callable[[str], None],
        touched: Callable[[str], None],
        prove: Callable[[Claim], Claim],
    ) -> None:
        """`send(address, message)` queues; `emit(kind, site)` tells the user; `gone(site)` follows a reaped member.

        `touched(site)` follows every change of who lives at which incarnation; `prove` signs our own claim.
        """
        self.site = settings.site
        self.address = address
        self.incarnation = settings.incarnation
        self.left = False
        self.taken_by: str | None = None
        self.contacted = False
        self.health = 0
        self.rumours = Rumours()
        self.peers: dict[str, Peer] = {}
        self._t = settings.timing
        self._rng = settings.rng
        self._timers = timers
        self._send = send
        self._emit = emit
        self._pack = pack
        self._gone = gone
        self._touched = touched
        self._prove = prove
        self._order: list[str] = []
        self._last_target = ""
        self._waiting: dict[int, Waiting] = {}
        self._seq = self._rng.getrandbits(32)
        self._seeds: dict[str, Seed] = {}
        self._farewells: set[str] = set()
        self._started_s = 0.0
        self._refuted_s = -1.0

    # ---------------------------------------------------------------- what a user asks for

    def start(self, now: float, seeds: Iterable[str]) -> None:
        """Begin to probe, and to call the seeds."""
        self._started_s = now
        self._timers.at(now + self._jitter(self._t.probe_interval_s), self._tick)
        self.join(seeds, now)

    def join(self, addresses: Iterable[str], now: float) -> None:
        """Call addresses until somebody answers, with back-off; and again whenever that member is lost."""
        for address in addresses:
            if address != self.address and address not in self._seeds:
                seed = self._seeds[address] = Seed(address, self._t.retry_first_s)
                self._call_seed(seed, now)

    def leave(self, now: float) -> None:
        """Say farewell to every live member, again and again until each has answered (`farewells` empties)."""
        if not self.left:
            self.left = True
            self._touched(self.site)
            self._farewells = {peer.site for peer in self.live()}
            self._farewell(now)

    @property
    def farewells(self) -> int:
        """Members that have not confirmed our farewell yet."""
        return len(self._farewells)

    @property
    def silent(self) -> bool:
        """Whether this peer has given way to another of its name, and says nothing any more."""
        return self.taken_by is not None

    def live(self) -> list[Peer]:
        """The other members that count, suspects included, in the order of their names."""
        return [peer for _, peer in sorted(self.peers.items()) if peer.live]

    def own_claim(self) -> Claim:
        """What we say of ourselves."""
        return self._prove(Claim(self.site, self.address, LEFT if self.left else ALIVE, self.incarnation))

    def members(self) -> tuple[Member, ...]:
        """Everybody known, ourselves included, sorted by name."""
        own = self.own_claim()
        everybody = [peer.member() for peer in self.peers.values()]
        everybody.append(Member(own.site, own.address, own.state, own.incarnation))
        return tuple(sorted(everybody, key=lambda member: member.site))

    # ---------------------------------------------------------------- what arrives

    def hear(self, sender: Sender, source: str, now: float) -> bool:
        """Take the head of a datagram. False: do not listen to the rest."""
        if self.silent:
            return False
        if sender.site == self.site:
            if sender.address == self.address:
                self._seeds.pop(source, None)  # we are among our own seeds
            return False
        peer = self.peers.get(sender.site)
        state = LEFT if sender.left else ALIVE
        claim = Claim(sender.site, sender.address, state, sender.incarnation, proof=sender.proof)
        if peer is not None and peer.address != sender.address and peer.live:
            self._contest(peer, source, now)
            return False
        self.consider(claim, now)
        peer = self.peers.get(sender.site)
        if peer is None:
            return sender.left  # a farewell to a stranger is answered all the same
        self.contacted = True
        if peer.claim().beats(claim):
            self._send(source, Rumour(peer.claim()))  # it does not know what is said of it: let it refute
        return True

    def ping(self, sender: Sender, source: str, message: Ping) -> None:
        """Answer, if we are meant."""
        if message.target in ("", self.site):
            self._send(source, Ack(message.seq))

    def ack(self, sender: Sender, message: Ack, now: float) -> None:
        """An answer to one of our pings, or a helper's good news."""
        waiting = self._waiting.get(message.seq)
        if waiting is None or waiting.site not in ("", sender.site):
            return
        del self._waiting[message.seq]
        peer = self.peers.get(sender.site)
        if peer is not None and waiting.why != "helper" and peer.address == sender.address:
            peer.rtt.answered(now - waiting.sent_s)
        if waiting.probe is not None:
            self._probe_succeeded(waiting.probe)
        if waiting.relay is not None:
            self._send(waiting.relay[0], Ack(waiting.relay[1]))
        if waiting.why == "seed" and waiting.address in self._seeds:
            self._seeds[waiting.address].site = sender.site
        elif waiting.why == "farewell":
            self._farewells.discard(sender.site)
        elif waiting.why == "contest" and peer is not None and peer.contest is not None:
            peer.contest.cancel()
            peer.contest = None
            peer.defended_s = now
            if waiting.claimant:
                self._send(waiting.claimant, Taken(peer.address))

    def nack(self, sender: Sender, message: Nack) -> None:
        """A helper is well but could not reach the target: the fault is not with us."""
        waiting = self._waiting.get(message.seq)
        if waiting is not None and waiting.why == "helper" and waiting.site == sender.site and waiting.probe:
            waiting.probe.nacked.add(sender.site)

    def ping_request(self, source: str, message: PingRequest, now: float) -> None:
        """Probe a target for somebody else."""
        if message.target == self.site:
            self._send(source, Ack(message.seq))
            return
        seq = self._ping(message.address, message.target, now, "relay", relay=(source, message.seq))
        known = self.peers.get(message.target)
        if known is not None and known.state == SUSPECT:
            self._send(message.address, Rumour(known.claim()))

        def give_up(_: float) -> None:
            if self._waiting.get(seq) is not None:
                self._send(source, Nack(message.seq))

        self._timers.at(now + NACK_SHARE * message.budget_ms / 1000, give_up)

    def namesake(self, sender: Sender, source: str) -> None:
        """Another process with our name pings us, from another address: the name is taken."""
        if sender.address != self.address and not sender.left and not self.left:
            self._send(source, Taken(self.address))

    def taken(self, sender: Sender, message: Taken, now: float) -> None:
        """Another living peer has our name. A newcomer gives way; who was there first goes on."""
        if message.address == self.address:
            return
        self._emit("conflict", self.site)
        if now - self._started_s < NEWCOMER_S:
            self.taken_by = message.address

    def consider(self, claim: Claim, now: float) -> None:
        """Weigh a claim about anybody, from anybody."""
        if claim.site == self.site:
            self._about_us(claim, now)
            return
        peer = self.peers.get(claim.site)
        if peer is None:
            if claim.state in (ALIVE, SUSPECT) and len(self.peers) < config.MAX_MEMBERS:
                self._welcome(claim, now)
            return
        if claim.state == SUSPECT == peer.state and claim.incarnation == peer.incarnation:
            self._confirm(peer, claim.accuser, now)
            return
        if not claim.beats(peer.claim()):
            return
        if claim.address != peer.address:
            if claim.state == ALIVE and peer.live:
                self._contest(peer, None, now)
                return
            if claim.state != ALIVE:
                return  # said of another process with that name; only a living one can take its place
        self._change(peer, claim, now)

    # ---------------------------------------------------------------- changes of state

    def _about_us(self, claim: Claim, now: float) -> None:
        own = self.own_claim()
        if self.left or claim.incarnation < self.incarnation or claim.incarnation >= config.MAX_COUNTER:
            return
        if claim.address == self.address:
            if not claim.beats(own):
                return
            if claim.state != ALIVE:
                self.health = min(MAX_HEALTH, self.health + 1)  # we were too slow to answer
        # Elsewhere it is said of a process that had our name before us, with a counter that we have to pass.
        self.incarnation = claim.incarnation + 1
        self._touched(self.site)
        if now - self._refuted_s >= REFUTE_GAP_S:
            self._refuted_s = now
            self._tell(self.own_claim())

    def _welcome(self, claim: Claim, now: float) -> None:
        peer = self.peers[claim.site] = Peer(claim.site, claim.address, ALIVE, claim.incarnation, claim.proof)
        self._touched(claim.site)
        self._enlist(peer, now)
        if claim.state == SUSPECT:
            self._change(peer, claim, now)
        else:
            self._tell(peer.claim())

    def _enlist(self, peer: Peer, now: float) -> None:
        """A member appeared, or came back: probe it from now on, and get to know the path quickly."""
        if peer.site not in self._order:
            place = int(self._rng.random() * (len(self._order) + 1))
            self._order.insert(place, peer.site)
        self._emit("joined", peer.site)
        peer.greetings = self._t.greetings
        self._greet(peer, now)

    def _change(self, peer: Peer, claim: Claim, now: float) -> None:
        before = peer.state
        if peer.address != claim.address:
            peer.rtt = type(peer.rtt)()
        peer.address, peer.state, peer.incarnation = claim.address, claim.state, claim.incarnation
        peer.proof = claim.proof
        self._touched(peer.site)
        for timer in (peer.chore, peer.reaper, peer.suspicion.timer if peer.suspicion else None):
            if timer is not None:
                timer.cancel()
        peer.chore = peer.reaper = peer.suspicion = None
        self._tell(peer.claim(claim.accuser))
        if claim.state == ALIVE:
            if before == SUSPECT:
                self._emit("refuted", peer.site)
            elif before in (DEAD, LEFT):
                self._enlist(peer, now)
        elif claim.state == SUSPECT:
            if before in (DEAD, LEFT):
                self._enlist(peer, now)
            self._suspect(peer, claim.accuser, now)
            if before != SUSPECT:
                self._emit("suspect", peer.site)
        else:
            self._bury(peer, before, now)

    def _bury(self, peer: Peer, before: str, now: float) -> None:
        if peer.probe is not None and peer.probe.timer is not None:
            peer.probe.timer.cancel()
        peer.probe = None
        self._farewells.discard(peer.site)
        if before != peer.state:
            self._emit(peer.state, peer.site)
        keep_s = self._t.dead_reap_s if peer.state == DEAD else self._t.left_reap_s
        peer.reaper = self._timers.at(now + keep_s, lambda _: self._reap(peer))
        if peer.state == DEAD:
            peer.retry_s = self._t.retry_first_s
            peer.chore = self._timers.at(now + peer.retry_s, lambda then: self._call_dead(peer, then))

    def _reap(self, peer: Peer) -> None:
        if self.peers.get(peer.site) is peer and not peer.live:
            if peer.chore is not None:
                peer.chore.cancel()
            del self.peers[peer.site]
            self._touched(peer.site)
            self._gone(peer.site)

    def _tell(self, claim: Claim) -> None:
        self.rumours.add(claim, self._pack(Rumour(claim)), len(self.peers) + 1)

    # ---------------------------------------------------------------- probing

    def _jitter(self, delay_s: float) -> float:
        return delay_s * (0.9 + 0.2 * self._rng.random())

    def _patience(self, peer: Peer) -> float:
        """How long to wait for a direct answer of `peer`, as the path and our own health demand."""
        t = self._t
        floor_s, default_s, ceiling_s = t.direct_floor_s, t.direct_default_s, t.direct_ceiling_s
        wait_s = peer.rtt.timeout_s(floor_s=floor_s, default_s=default_s, ceiling_s=ceiling_s)
        return wait_s * (1 + self.health)

    def _tick(self, now: float) -> None:
        if self.left or self.silent:
            return
        others = sum(1 for peer in self.peers.values() if peer.live)
        interval_s = max(self._t.probe_floor_s, self._t.probe_interval_s / max(others, 1))
        self._timers.at(now + self._jitter(interval_s) * (1 + self.health), self._tick)
        target = self._next_target()
        if target is not None and target.probe is None:
            self._probe(target, now)

    def _next_target(self) -> Peer | None:
        for _ in range(2):
            while self._order:
                peer = self.peers.get(self._order.pop())
                if peer is not None and peer.live:
                    self._last_target = peer.site
                    return peer
            self._order = [peer.site for peer in self.live()]
            self._rng.shuffle(self._order)
            if len(self._order) > 1 and self._order[-1] == self._last_target:
                self._order[0], self._order[-1] = self._order[-1], self._order[0]  # never the same one twice in a row
        return None

    def _ping(
        self,
        address: str,
        site: str,
        now: float,
        why: Literal["probe", "plain", "seed", "relay", "contest", "farewell"],
        *,
        probe: Probe | None = None,
        relay: tuple[str, int] | None = None,
        claimant: str | None = None,
    ) -> int:
        seq = self._expect(Waiting(site, address, now, why, probe, relay, claimant))
        self._send(address, Ping(seq, site))
        return seq

    def _expect(self, waiting: Waiting) -> int:
        while self._waiting:
            oldest = next(iter(self._waiting))
            if len(self._waiting) < MAX_PENDING and waiting.sent_s - self._waiting[oldest].sent_s < PENDING_S:
                break
            del self._waiting[oldest]
        self._seq = (self._seq + 1) % 2**32
        self._waiting[self._seq] = waiting
        return self._seq

    def _probe(self, peer: Peer, now: float) -> None:
        probe = peer.probe = Probe(peer.site)
        self._ping(peer.address, peer.site, now, "probe", probe=probe)
        self._accuse(peer)
        probe.timer = self._timers.at(
            now + self._patience(peer), lambda then: self._ask_helpers(peer, probe, then), patient=True
        )

    def _accuse(self, peer: Peer) -> None:
        """Send what is said of a peer along with a ping to it (Lifeguard's buddy system)."""
        if peer.state != ALIVE:
            self._send(peer.address, Rumour(peer.claim()))

    def _ask_helpers(self, peer: Peer, probe: Probe, now: float) -> None:
        peer.rtt.lost()
        budget_s = self._patience(peer)
        able = [other for other in self.live() if other.state == ALIVE and other.site != peer.site]
        helpers = self._rng.sample(able, min(self._t.helpers, len(able)))
        for helper in helpers:
            seq = self._expect(Waiting(helper.site, helper.address, now, "helper", probe))
            self._send(helper.address, PingRequest(seq, peer.site, peer.address, max(1, int(budget_s * 1000))))
            probe.helpers.append(helper.site)
        self._ping(peer.address, peer.site, now, "probe", probe=probe)
        wait_s = budget_s + max((self._patience(helper) for helper in helpers), default=0.0)
        probe.timer = self._timers.at(now + wait_s, lambda then: self._probe_failed(peer, probe, then), patient=True)

    def _probe_succeeded(self, probe: Probe) -> None:
        peer = self.peers.get(probe.site)
        if peer is not None and peer.probe is probe:
            peer.probe = None
            if probe.timer is not None:
                probe.timer.cancel()
            self.health = max(0, self.health - 1)

    def _probe_failed(self, peer: Peer, probe: Probe, now: float) -> None:
        if peer.probe is not probe:
            return
        peer.probe = None
        # A helper that is well says so. One that says nothing, and is not suspected, speaks against our own path.
        mute = [site for site in probe.helpers if site not in probe.nacked and self._is_alive(site)]
        self.health = min(MAX_HEALTH, self.health + len(mute))
        if peer.state == ALIVE:
            self.consider(peer.claim(self.site)._replace(state=SUSPECT), now)
        elif peer.state == SUSPECT:
            self._confirm(peer, self.site, now)

    def _is_alive(self, site: str) -> bool:
        peer = self.peers.get(site)
        return peer is not None and peer.state == ALIVE

    # ---------------------------------------------------------------- suspicion

    def _suspect(self, peer: Peer, accuser: str, now: float) -> None:
        least_s = max(self._t.suspicion_floor_s, 3 * self._patience(peer))
        others = sum(1 for other in self.peers.values() if other.state == ALIVE)
        peer.suspicion = Suspicion(now, accuser=accuser, possible=others, min_s=least_s, max_s=2 * least_s)
        self._set_suspicion_timer(peer, peer.suspicion, now)
        if accuser != self.site and peer.probe is None:
            self._probe(peer, now)  # see for ourselves, instead of waiting for its turn
        peer.chore = self._timers.at(now + self._t.buddy_s, lambda then: self._buddy(peer, then))

    def _set_suspicion_timer(self, peer: Peer, suspicion: Suspicion, now: float) -> None:
        if suspicion.timer is not None:
            suspicion.timer.cancel()
        due_s = max(now, suspicion.deadline_s)
        suspicion.timer = self._timers.at(due_s, lambda then: self._condemn(peer, suspicion, then), patient=True)

    def _confirm(self, peer: Peer, accuser: str, now: float) -> None:
        if peer.suspicion is not None and peer.suspicion.confirm(accuser):
            self._tell(peer.claim(accuser))
            self._set_suspicion_timer(peer, peer.suspicion, now)

    def _condemn(self, peer: Peer, suspicion: Suspicion, now: float) -> None:
        if peer.suspicion is suspicion and peer.state == SUSPECT:
            self.consider(peer.claim()._replace(state=DEAD), now)

    def _buddy(self, peer: Peer, now: float) -> None:
        if peer.state == SUSPECT and not self.left and not self.silent:
            self._ping(peer.address, peer.site, now, "plain")
            self._accuse(peer)
            peer.chore = self._timers.at(now + self._t.buddy_s, lambda then: self._buddy(peer, then))

    # ---------------------------------------------------------------- calling those who are not there

    def _greet(self, peer: Peer, now: float) -> None:
        """A few quick pings, so that the pair's RTT is known within a second and the states meet at once."""
        if peer.live and peer.greetings > 0 and not self.left and not self.silent:
            peer.greetings -= 1
            self._ping(peer.address, peer.site, now, "plain")
            self._timers.at(now + self._jitter(self._t.greet_s), lambda then: self._greet(peer, then))

    def _call_seed(self, seed: Seed, now: float) -> None:
        if self.left or self.silent or self._seeds.get(seed.address) is not seed:
            return
        holder = self.peers.get(seed.site)
        if holder is not None and holder.live:
            seed.delay_s = self._t.retry_first_s
            seed.timer = self._timers.at(now + self._t.retry_max_s, lambda then: self._call_seed(seed, then))
            return
        self._ping(seed.address, "", now, "seed")
        seed.timer = self._timers.at(now + self._jitter(seed.delay_s), lambda then: self._call_seed(seed, then))
        seed.delay_s = min(self._t.retry_max_s, seed.delay_s * self._t.retry_factor)

    def _call_dead(self, peer: Peer, now: float) -> None:
        if peer.state != DEAD or self.left or self.silent or self.peers.get(peer.site) is not peer:
            return
        self._ping(peer.address, peer.site, now, "plain")
        self._accuse(peer)
        peer.retry_s = min(self._t.retry_max_s, peer.retry_s * self._t.retry_factor)
        peer.chore = self._timers.at(now + self._jitter(peer.retry_s), lambda then: self._call_dead(peer, then))

    def _farewell(self, now: float) -> None:
        waits: list[float] = []
        for site in sorted(self._farewells):
            peer = self.peers[site]
            self._ping(peer.address, site, now, "farewell")
            waits.append(self._patience(peer))
        if waits:
            self._timers.at(now + max(waits), self._farewell)

    def _contest(self, peer: Peer, claimant: str | None, now: float) -> None:
        """Somebody claims the name of a living member from another address: ask whoever holds it, three times."""
        if peer.contest is not None or now - peer.defended_s < CONTEST_GAP_S:
            return
        patience_s = self._patience(peer)
        asked = 0

        def ask(then: float) -> None:
            nonlocal asked
            if asked < 3 and peer.live:
                asked += 1
                self._ping(peer.address, peer.site, then, "contest", claimant=claimant)
                peer.contest = self._timers.at(then + patience_s, ask, patient=True)
                return
            peer.contest = None
            if peer.live:
                self.consider(peer.claim()._replace(state=DEAD), then)

        ask(now)
