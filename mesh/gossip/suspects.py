"""Suspects until their time is up: looked for by ourselves, told of the accusation, condemned only with clear sight.

The wait is Lifeguard's (`suspicion`). When it is over, a suspect is condemned if a probe of our own has failed since,
and if the silence is not our own fault: a site that hears next to nobody waits, or follows the verdicts of others.
"""

from __future__ import annotations

from collections.abc import Callable

from mesh.gossip import config
from mesh.gossip.members import SUSPECT, Peer
from mesh.gossip.messages import Rumour
from mesh.gossip.own import Own
from mesh.gossip.probing import Prober
from mesh.gossip.suspicion import Suspicion

#: With clouded sight, or without a witness, nobody is condemned before this silence, unless so many others have
#: condemned it. The second holds where nobody at all was heard for a third of it: then we are deaf, or really alone.
CLOUDED_S = 60.0
ALONE_S = 30.0
CLOUDED_VERDICTS = 3
#: Clouded sight is known only where there are helpers enough to judge it by.
CLOUDED_LEAST = 4
#: From this many members on, checks of an accused site are spread over time, so that they do not come as one burst.
CROWD = 64
#: Each return from a death that was none quarters our haste with a site, up to this wait.
MAX_PATIENT_S = 60.0


class Suspects:
    """See the module."""

    def __init__(self, own: Own, prober: Prober, *, condemn: Callable[[Peer, float], None]) -> None:
        """`condemn(peer, now)`: its time is up."""
        self._own = own
        self._prober = prober
        self._condemn = condemn

    def suspect(self, peer: Peer, accuser: str, now: float, *, said: bool) -> None:
        """A peer has become a suspect: set its time, and look for ourselves. `said`: we accuse it in public."""
        own, t = self._own, self._own.t
        others = len(own.roster.live()) - 1  # that could confirm
        if t.fixed:
            wanted = t.confirmations if others - 1 >= t.confirmations else 0
            least_s = t.suspicion_mult * config.spread(len(own.roster) + 1) * t.probe_interval_s
            lone_s = least_s
        else:
            wanted = min(t.confirmations, others)
            least_s = max(t.suspicion_floor_s, 3 * self._prober.path_s(peer))
            least_s = min(max(least_s, MAX_PATIENT_S), least_s * 4**peer.returns)
            # With two sites nobody can confirm: half way between haste and patience.
            lone_s = least_s * (1 + t.suspicion_spread) / 2
        most_s = least_s * t.suspicion_spread
        peer.suspicion = Suspicion(now, accuser=accuser, wanted=wanted, min_s=least_s, max_s=most_s, lone_s=lone_s)
        peer.suspicion.said = said
        self._set_timer(peer, peer.suspicion, now)
        if t.fixed:
            return
        if accuser != own.site and peer.probe is None:  # see for ourselves, instead of waiting for its turn
            if others < CROWD:
                self._prober.probe(peer, now)
            else:
                peer.chore = own.timers.at(now + own.rng.random() * least_s / 2, lambda then: self._check(peer, then))
                return
        peer.chore = own.timers.at(now + t.buddy_s, lambda then: self._buddy(peer, then))

    def _check(self, peer: Peer, now: float) -> None:
        if peer.state == SUSPECT and not self._own.quiet:
            if peer.probe is None:
                self._prober.probe(peer, now)
            peer.chore = self._own.timers.at(now + self._own.t.buddy_s, lambda then: self._buddy(peer, then))

    def _buddy(self, peer: Peer, now: float) -> None:
        """Ping a suspect all the while, with its accusation."""
        own, suspicion = self._own, peer.suspicion
        if peer.state == SUSPECT and suspicion is not None and not own.quiet:
            self._prober.ping(peer.address, peer.site, now, "plain")
            own.send(peer.address, Rumour(peer.claim(own.site)))
            # Whoever is patient need not insist: the pings thin out as the suspicion grows old.
            gap_s = max(own.t.buddy_s, (now - suspicion.started_s) / 8)
            peer.chore = own.timers.at(now + gap_s, lambda then: self._buddy(peer, then))

    def confirm(self, peer: Peer, accuser: str, now: float, *, aloud: bool = True) -> None:
        """Another accuses a suspect, or we do: its time grows shorter. `aloud`: pass it on, once."""
        suspicion = peer.suspicion
        if suspicion is None:
            return
        ours, news = accuser == self._own.site, suspicion.confirm(accuser)
        if aloud and (news or (ours and not suspicion.said and accuser in suspicion.accusers)):
            suspicion.said |= ours
            self._own.tell(peer.claim(accuser))
        if news:
            self._set_timer(peer, suspicion, now)

    def _set_timer(self, peer: Peer, suspicion: Suspicion, now: float) -> None:
        if suspicion.timer is not None:
            suspicion.timer.cancel()
        due_s = max(now, suspicion.deadline_s)
        suspicion.timer = self._own.timers.at(due_s, lambda then: self._judge(peer, suspicion, then), patient=True)

    def _judge(self, peer: Peer, suspicion: Suspicion, now: float) -> None:
        """The time of a suspect is up."""
        own = self._own
        if peer.suspicion is not suspicion or peer.state != SUSPECT:
            return
        if not own.t.fixed and (not suspicion.checked or self._doubtful(peer, suspicion, now)):
            if peer.probe is None:
                self._prober.probe(peer, now)
            wait_s = max(self._prober.patience_s(peer) / 2, (now - suspicion.deadline_s) / 4)
            suspicion.timer = own.timers.at(now + wait_s, lambda then: self._judge(peer, suspicion, then), patient=True)
            return
        self._condemn(peer, now)

    def _doubtful(self, peer: Peer, suspicion: Suspicion, now: float) -> bool:
        """Whether the silence may be our own fault."""
        clear = suspicion.witnessed and not self._own.clouded
        if clear or len(self._own.roster.live()) < CLOUDED_LEAST:
            return False
        silent_s = now - max(peer.alive_s, suspicion.started_s)
        patient_s = ALONE_S if now - self._own.heard_s > ALONE_S / 3 else CLOUDED_S
        return silent_s < patient_s and len(suspicion.verdicts) < CLOUDED_VERDICTS
