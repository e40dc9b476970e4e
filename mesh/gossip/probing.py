"""Who answers: pings round-robin, indirect probes through helpers, a second path over streams (SWIM, section 3.1).

Every tick one member is pinged. Silence beyond the direct timeout of that pair brings in three helpers, a second direct
ping, and a ping over a stream where there are streams. A direct path that does not answer while another does is only a
broken path (`Reach`), which is tried again with back-off; the peer lives. Where paths work one way, an answer may come
back another: whoever is pinged by a helper answers the asker as well, and who spoke meanwhile is not silent.

Helpers that are well say so even when the target is silent to them too; then they are witnesses. Where none of them
says anything, six others are asked, and if they are as silent the probe has failed without a witness: then the fault is
most likely ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from mesh.gossip.members import SUSPECT, Peer, Probe
from mesh.gossip.messages import Ack, Nack, Ping, PingRequest, Rumour, Sender
from mesh.gossip.own import Own
from mesh.gossip.turns import Turns

#: Sequence numbers remembered, and for how long: beyond the slowest round trip that counts.
MAX_PENDING = 4096
PENDING_S = 10.0
#: Beyond this many others the time between two probes grows with the root of their number.
CROWD = 16
#: Helpers remembered that reached a target; one of the three is always drawn anew.
MAX_GUIDES = 2
#: Indirect probes run for others at once; a helper cannot be made to flood a target.
MAX_RELAYS = 64

Why = Literal["probe", "helper", "plain", "seed", "relay", "contest", "farewell", "stream"]


class Waiting(NamedTuple):
    """What an answer to one of our pings means."""

    site: str
    address: str
    sent_s: float
    why: Why
    probe: Probe | None = None
    relay: tuple[str, int] | None = None
    claimant: str | None = None


class Prober:
    """Pings, and what their answers or their absence say."""

    def __init__(
        self,
        own: Own,
        *,
        alive: Callable[[Peer, float], None],
        silent: Callable[[Peer, bool, float], None],
        answered: Callable[[Waiting, Sender, float], None],
        reaches: Callable[[str, str], bool | None],
        estimate_s: Callable[[str], float | None],
    ) -> None:
        """`alive(peer, now)`: there is evidence of its life. `silent(peer, witnessed, now)`: a whole probe found none.

        `answered` follows answers to pings with a purpose of their own. `reaches(helper, target)`: whether the helper
        says that it reaches the target, None where it does not say. `estimate_s(site)`: a guess of an unmeasured RTT.
        """
        self._own = own
        self._alive = alive
        self._silent = silent
        self._answered = answered
        self._reaches = reaches
        self._estimate_s = estimate_s
        self.turns = Turns(own)
        self._running: Probe | None = None
        self._relays = 0
        self._waiting: dict[int, Waiting] = {}
        self._seq = own.rng.getrandbits(32)

    # ---------------------------------------------------------------- whose turn it is

    def start(self, now: float) -> None:
        """Begin to probe."""
        self._own.timers.at(now + self._own.t.probe_interval_s * self._own.rng.random(), self._tick)

    def interval_s(self) -> float:
        """Seconds between two probes of ours, in good health."""
        t, others = self._own.t, max(1, len(self._own.roster.live()))
        least_s = max(t.probe_floor_s, min(t.probe_crowd_s, t.probe_floor_s * math.sqrt(others / CROWD)))
        return max(least_s, t.probe_interval_s / others)

    def _tick(self, now: float) -> None:
        own = self._own
        if own.quiet:
            return
        if own.t.fixed:
            own.timers.at(now + own.t.probe_interval_s, self._tick)
            if self._running is not None:
                return  # memberlist's prober does one thing at a time
        else:
            own.timers.at(now + own.jitter(self.interval_s()) * (1 + own.health), self._tick)
        target = self.turns.next()
        if target is not None and target.probe is None:
            self.probe(target, now)
            self._running = target.probe

    # ---------------------------------------------------------------- one ping

    def patience_s(self, peer: Peer) -> float:
        """How long to wait for a direct answer of `peer`, as the path and our own health demand."""
        return self.path_s(peer) * (1 if self._own.t.fixed else 1 + self._own.health)

    def path_s(self, peer: Peer) -> float:
        """How long a direct answer of `peer` takes at most, as its path was measured."""
        t = self._own.t
        if t.fixed:
            return t.direct_default_s
        floor_s, default_s, ceiling_s = t.direct_floor_s, t.direct_default_s, t.direct_ceiling_s
        estimate_s = None if peer.rtt.measured else self._estimate_s(peer.site)
        return peer.rtt.timeout_s(floor_s=floor_s, default_s=default_s, ceiling_s=ceiling_s, estimate_s=estimate_s)

    def _quick_s(self, helper: Peer) -> float:
        """How long a helper takes to answer when it is well: one that is slow itself must not hold up the verdict."""
        summary = helper.rtt.summary()
        usual_s = self.path_s(helper)
        return usual_s if summary is None else min(usual_s, 1.5 * summary.min_s + 0.1)

    def ping(
        self,
        address: str,
        site: str,
        now: float,
        why: Why,
        *,
        probe: Probe | None = None,
        relay: tuple[str, int] | None = None,
        claimant: str | None = None,
        asker: tuple[str, int] = ("", 0),
    ) -> int:
        """Ping `site` (empty: whoever is there) at `address`. Returns the sequence number."""
        seq = self._expect(Waiting(site, address, now, why, probe, relay, claimant))
        self._own.send(address, Ping(seq, site, *asker))
        peer = self._own.roster.get(site)
        if peer is not None and peer.address == address:
            peer.reach.sent += 1
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

    def ack(self, sender: Sender, seq: int, now: float) -> float | None:
        """An answer to one of our pings, or a helper's good news. The round trip in seconds, where it tells one."""
        waiting = self._waiting.get(seq)
        if waiting is None or (waiting.site not in ("", sender.site) and not _for_helper(waiting, sender)):
            return None
        rtt_s = None
        del self._waiting[seq]
        peer = self._own.roster.get(sender.site)
        direct = waiting.why not in ("helper", "stream")
        if peer is not None and direct and peer.address == sender.address:
            rtt_s = now - waiting.sent_s
            peer.rtt.answered(rtt_s)
            peer.reach.came_back(now)
            if peer.recheck is not None:
                peer.recheck.cancel()
                peer.recheck = None
        if waiting.why == "helper":
            self._own.helped(True)
        if waiting.probe is not None:
            self._succeeded(waiting, sender, direct, now)
        if waiting.relay is not None:
            self._own.send(waiting.relay[0], Ack(waiting.relay[1]))
        self._answered(waiting, sender, now)
        return rtt_s

    def nack(self, sender: Sender, seq: int) -> None:
        """A helper is well but could not reach the target: the fault is not with us."""
        waiting = self._waiting.get(seq)
        probe = waiting.probe if waiting is not None and waiting.site == sender.site else None
        if probe is not None and sender.site in probe.helpers and sender.site not in probe.nacked:
            self._own.helped(True)
            probe.nacked.add(sender.site)

    def relay(self, asker: str, source: str, request: PingRequest, now: float) -> None:
        """Probe a target for somebody else, and say early enough if it does not answer us either."""
        if self._relays >= MAX_RELAYS:
            return
        self._relays += 1
        # memberlist's helpers do not say for whom they ask.
        named = ("", 0) if self._own.t.fixed else (asker, request.seq)
        seq = self.ping(request.address, request.target, now, "relay", relay=(source, request.seq), asker=named)
        known = self._own.roster.get(request.target)
        if known is not None and known.state == SUSPECT:
            self._own.send(request.address, Rumour(known.claim(self._own.site)))

        def give_up(_: float) -> None:
            self._relays -= 1
            if seq in self._waiting:
                self._own.send(source, Nack(request.seq))

        self._own.timers.at(now + self._own.t.nack_share * request.budget_ms / 1000, give_up)

    # ---------------------------------------------------------------- one probe

    def probe(self, peer: Peer, now: float) -> None:
        """Find out whether a peer lives."""
        own = self._own
        probe = peer.probe = Probe(peer.site, now)
        self.ping(peer.address, peer.site, now, "probe", probe=probe)
        if peer.state == SUSPECT:  # the accusation goes with the ping (Lifeguard's buddy system, section IV-C)
            own.send(peer.address, Rumour(peer.claim(own.site)))
        # A path that is known to be broken need not be waited for.
        wait_s = 0.0 if peer.reach.broken and not own.t.fixed else self.patience_s(peer)
        probe.timer = own.timers.at(now + wait_s, lambda then: self._ask_helpers(peer, probe, then), patient=True)

    def drop(self, peer: Peer) -> None:
        """A peer need not be probed any more."""
        if peer.probe is not None and peer.probe.timer is not None:
            peer.probe.timer.cancel()
        if peer.probe is self._running:
            self._running = None
        peer.probe = None

    def _ask_helpers(self, peer: Peer, probe: Probe, now: float) -> None:
        """Bring in helpers: three, and where those are `again` needed, twice as many."""
        own, t = self._own, self._own.t
        peer.rtt.lost()
        peer.reach.missed(now)
        wait_s = budget_s = self.patience_s(peer)
        for helper in self._helpers(peer, probe):
            if not t.fixed:  # what the helper needs to the target is at most both of our paths together
                quick_s = self._quick_s(helper)
                budget_s = self.patience_s(peer) + quick_s
                wait_s = max(wait_s, budget_s + quick_s)
            seq = self._expect(Waiting(helper.site, helper.address, now, "helper", probe))
            own.send(helper.address, PingRequest(seq, peer.site, peer.address, max(1, int(budget_s * 1000))))
            probe.helpers.append(helper.site)
        seq = self._expect(Waiting(peer.site, peer.address, now, "stream", probe))
        if not own.ask(peer.address, peer.site, [Ping(seq, peer.site)]):
            del self._waiting[seq]
        if t.fixed:
            wait_s = max(0.0, probe.started_s + t.probe_interval_s * (1 + own.health) - now)
        else:
            self.ping(peer.address, peer.site, now, "probe", probe=probe)
        probe.timer = own.timers.at(now + wait_s, lambda then: self._failed(peer, probe, then), patient=True)

    def _helpers(self, peer: Peer, probe: Probe) -> list[Peer]:
        """Who is most likely to reach `peer`: those that did, those that say they can, and always one drawn anew."""
        own = self._own
        wanted = own.t.helpers
        if own.t.fixed:
            return own.roster.draw(own.rng, wanted, peer.site)
        drawn = own.roster.draw(own.rng, 3 * wanted, peer.site)
        if probe.again:  # the others first
            return sorted(drawn, key=lambda other: other.site in probe.helpers)[: 2 * wanted]
        chosen = [own.roster.peers[site] for site in peer.guides if own.roster.is_alive(site)][: max(0, wanted - 1)]
        rank = {True: 0, None: 1, False: 2}
        rest = [other for other in drawn if other not in chosen]
        rest.sort(key=lambda other: (other.reach.broken, rank[self._reaches(other.site, peer.site)]))
        return chosen + rest[: wanted - len(chosen)]

    def _succeeded(self, waiting: Waiting, sender: Sender, direct: bool, now: float) -> None:
        probe = waiting.probe
        assert probe is not None
        peer = self._own.roster.get(probe.site)
        if peer is None or not peer.live:
            return
        if waiting.why == "helper":
            peer.guides = (waiting.site, *(site for site in peer.guides if site != waiting.site))[:MAX_GUIDES]
        if peer.probe is probe:
            self.drop(peer)
            self._own.well()
        if not direct:
            self._recheck(peer, now, 1.0)
        self._alive(peer, now)

    def _failed(self, peer: Peer, probe: Probe, now: float) -> None:
        if peer.probe is not probe:
            return
        if not (self._own.t.fixed or probe.again or probe.nacked) and probe.helpers:
            probe.again = True
            self._ask_helpers(peer, probe, now)
            return
        self.drop(peer)
        if not self._own.t.fixed:
            peer.reach.missed(now)
            if peer.alive_s >= probe.started_s:  # it has spoken to us meanwhile, though it answers nothing
                self._recheck(peer, now, 1.0)
                return
        # A helper that is well says so. One that says nothing, and is not suspected, speaks against our own path.
        mute = [site for site in probe.helpers if site not in probe.nacked and self._own.roster.is_alive(site)]
        for _ in mute:
            self._own.helped(False)
        if self._own.t.fixed:
            self._own.unwell(len(mute) if probe.helpers else 1)
        elif 2 * len(mute) > len(probe.helpers):
            # One point, not one for each as in Lifeguard: a helper may be slow itself.
            self._own.unwell(1)
        # Of two sites neither has anybody who could bear witness.
        witnessed = self._own.t.fixed or bool(probe.nacked) or len(self._own.roster.live()) == 1
        self._silent(peer, witnessed, now)

    def _recheck(self, peer: Peer, now: float, delay_s: float) -> None:
        """The peer lives but does not answer directly: ping it with back-off, to know the state of the path."""
        own = self._own
        if peer.recheck is not None or own.t.fixed:
            return

        def again(then: float) -> None:
            peer.recheck = None
            if not peer.live or own.quiet or own.roster.get(peer.site) is not peer:
                return
            if peer.reach.misses and peer.reach.answered_s < now:
                peer.reach.missed(then)
            self.ping(peer.address, peer.site, then, "plain")
            self._recheck(peer, then, min(own.t.retry_max_s, 2 * delay_s))

        peer.recheck = own.timers.at(now + own.jitter(delay_s), again)


def _for_helper(waiting: Waiting, sender: Sender) -> bool:
    """Whether the target of an indirect probe answers us itself what it answers our helper."""
    return waiting.why == "helper" and waiting.probe is not None and waiting.probe.site == sender.site
