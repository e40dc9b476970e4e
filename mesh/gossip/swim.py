"""Membership by SWIM, with Lifeguard's local health and timeouts that follow the measured path.

Sans-I/O: the owner of a `Swim` feeds it what arrived and the time, runs its timers, and sends what it says.

Theory of operation. `probing` pings one other member every tick, brings in helpers and a stream where it is silent, and
knows which paths are broken. `verdicts` weighs claims, keeps suspects until their time is up, and refutes what is said
of us. `absent` calls those who are not there, for ever, because both halves of a partition think the other dead.
`names` settles who keeps a name that two processes use. They share `own`: our word, our health, and the `roster`.
What a site says of itself stands at the head of a datagram. Constants: `config.Timing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mesh.gossip import config
from mesh.gossip.absent import Absentees, Known
from mesh.gossip.members import ALIVE, LEFT, Claim, Member, Peer
from mesh.gossip.messages import Ack, Message, Nack, Ping, PingRequest, Rumour, Sender, Taken
from mesh.gossip.names import Names
from mesh.gossip.own import Own
from mesh.gossip.probing import Prober, Waiting
from mesh.gossip.rumours import Rumours
from mesh.gossip.timers import Timers
from mesh.gossip.verdicts import Verdicts


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
        touched: Callable[[str], None] = lambda _: None,
        prove: Callable[[Claim], Claim] = lambda claim: claim,
        ask: Callable[[str, str, Iterable[Message]], bool] = lambda _address, _site, _messages: False,
        reaches: Callable[[str, str], bool | None] = lambda _helper, _target: None,
        estimate_s: Callable[[str], float | None] = lambda _site: None,
    ) -> None:
        """`send(address, message)` queues; `emit(kind, site)` tells the user; `gone(site)` follows a reaped member.

        `touched(site)` follows every change of who lives at which incarnation; `prove` signs our own claim; `ask`
        queues a request over a stream, False where there are none; `reaches(helper, target)`: whether the helper says
        that it reaches the target, None where it does not say; `estimate_s(site)` guesses an unmeasured RTT.
        """
        self._own = Own(
            settings, address, timers, send=send, emit=emit, pack=pack, touched=self._touch, prove=prove, ask=ask
        )
        self._follow = touched
        self.site = settings.site
        self.address = address
        self.contacted = False
        self.changes = 0
        self._farewells: set[str] = set()
        self._prober = Prober(
            self._own,
            alive=self._alive,
            silent=self._silent,
            answered=self._answered,
            reaches=reaches,
            estimate_s=estimate_s,
        )
        self._absent = Absentees(self._own, self._prober)
        self._names = Names(self._own, self._prober, condemn=self._condemn)
        self._verdicts = Verdicts(
            self._own, self._prober, self._absent, contest=self._names.contest, buried=self._buried, gone=gone
        )

    # ---------------------------------------------------------------- what a user asks for

    def start(self, now: float, seeds: Iterable[str]) -> None:
        """Begin to probe, and to call the seeds."""
        self._names.start(now)
        self._prober.start(now)
        self.join(seeds, now)

    def join(self, addresses: Iterable[str], now: float) -> None:
        """Call addresses until somebody answers, with back-off; and again whenever that member is lost."""
        self._absent.join(addresses, now)

    def remember(self, known: Iterable[Known], now: float) -> None:
        """Call whom an earlier start knew, until they answer; and take our own incarnation beyond what it was."""
        self._absent.remember(known, now)

    def known(self) -> list[Known]:
        """Whom to remember over a restart: everybody, ourselves and the forgotten included, sorted by name."""
        own = self._own.claim()
        return sorted([*self._absent.known(), Known(own.site, own.address, own.incarnation, own.state)])

    def leave(self, now: float) -> None:
        """Say farewell to every live member, again and again until each has answered (`farewells` empties)."""
        if not self._own.left:
            self._own.left = True
            self._own.touched(self.site)
            self._farewells = {peer.site for peer in self.live()}
            self._farewell(now)

    def restarted(self, site: str) -> None:
        """A site is a new process: that it came back speaks not against it."""
        peer = self._own.roster.get(site)
        if peer is not None:
            peer.returns = 0

    @property
    def peers(self) -> dict[str, Peer]:
        """Site -> what is known of it. Not to be changed."""
        return self._own.roster.peers

    @property
    def rumours(self) -> Rumours:
        """The claims that still have to travel."""
        return self._own.rumours

    @property
    def incarnation(self) -> int:
        """Ours."""
        return self._own.incarnation

    @property
    def health(self) -> int:
        """Lifeguard's local health: 0 is well."""
        return self._own.health

    @property
    def clouded(self) -> bool:
        """Whether our own paths are too bad to judge others."""
        return self._own.clouded

    @property
    def left(self) -> bool:
        """Whether we have said farewell."""
        return self._own.left

    @property
    def taken_by(self) -> str | None:
        """Where the peer is that has our name, once we have given way to it."""
        return self._own.taken_by

    @property
    def farewells(self) -> int:
        """Members that have not confirmed our farewell yet."""
        return len(self._farewells)

    @property
    def silent(self) -> bool:
        """Whether this peer has given way to another of its name, and says nothing any more."""
        return self._own.taken_by is not None

    def live(self) -> list[Peer]:
        """The other members that count, suspects included, in the order of their names. Not to be changed."""
        return self._own.roster.live()

    def own_claim(self) -> Claim:
        """What we say of ourselves."""
        return self._own.claim()

    def members(self) -> tuple[Member, ...]:
        """Everybody known, ourselves included, sorted by name."""
        own = self.own_claim()
        everybody = [peer.member() for peer in self.peers.values()]
        everybody.append(Member(own.site, own.address, own.state, own.incarnation))
        return tuple(sorted(everybody, key=lambda member: member.site))

    # ---------------------------------------------------------------- what arrives

    def hear(self, sender: Sender, source: str, now: float, *, direct: bool = True) -> bool:
        """Take the head of a datagram, or of a stream (not `direct`). False: do not listen to the rest."""
        own = self._own
        if self.silent:
            return False
        if sender.site == self.site:
            if sender.address == self.address:
                self._absent.not_a_seed(source)  # we are among our own seeds
            return False
        peer = own.roster.get(sender.site)
        if (
            peer is not None
            and peer.state == ALIVE
            and peer.incarnation == sender.incarnation
            and peer.address == sender.address
            and not sender.left
        ):  # what nearly every datagram says: nothing new
            self.contacted = True
            own.heard_s = peer.alive_s = now
            if direct:
                peer.reach.heard_s = now
            return True
        state = LEFT if sender.left else ALIVE
        claim = Claim(sender.site, sender.address, state, sender.incarnation, proof=sender.proof)
        if peer is not None and peer.address != sender.address and peer.live:
            self._names.contest(peer, source, now)
            return False
        self._verdicts.consider(claim, now)
        peer = self.peers.get(sender.site)
        if peer is None:
            grave = self._absent.grave(sender.site, now)
            if grave is not None and not sender.left:
                own.send(source, Rumour(grave))  # it does not know what is said of it: let it refute
                return True
            return sender.left  # a farewell to a stranger is answered all the same
        self.contacted = True
        own.heard_s = now
        if direct:
            peer.reach.heard_s = now
        if peer.claim().beats(claim):
            own.send(source, Rumour(peer.claim(self.site)))
        if peer.live and not sender.left:
            self._verdicts.alive(peer, now)
        return True

    def ping(self, sender: Sender, source: str, message: Ping) -> None:
        """Answer, if we are meant."""
        if message.target in ("", self.site):
            self._own.send(source, Ack(message.seq))
            asker = self._own.roster.get(message.asker)
            if asker is not None and asker.live:
                self._own.send(asker.address, Ack(message.asker_seq))

    def ack(self, sender: Sender, message: Ack, now: float) -> float | None:
        """An answer to one of our pings, or a helper's good news. The round trip in seconds, where it tells one."""
        return self._prober.ack(sender, message.seq, now)

    def nack(self, sender: Sender, message: Nack) -> None:
        """A helper is well but could not reach the target: the fault is not with us."""
        self._prober.nack(sender, message.seq)

    def ping_request(self, sender: Sender, source: str, message: PingRequest, now: float) -> None:
        """Probe a target for somebody else."""
        if message.target == self.site:
            self._own.send(source, Ack(message.seq))
        else:
            self._prober.relay(sender.site, source, message, now)

    def namesake(self, sender: Sender, source: str) -> None:
        """Another process with our name pings us, from another address: the name is taken."""
        self._names.namesake(sender, source)

    def taken(self, sender: Sender, message: Taken, now: float) -> None:
        """Another living peer has our name. A newcomer gives way; who was there first goes on."""
        self._names.taken(sender, message, now)

    def consider(self, claim: Claim, now: float) -> None:
        """Weigh a claim about anybody, from anybody."""
        self._verdicts.consider(claim, now)

    def learn(self, claim: Claim, now: float) -> None:
        """Weigh a claim that is news to us only: a member that others know is not told about again.

        A mesh that starts all at once would otherwise hear of each member a dozen times from each other.
        """
        self._own.hushed = claim.state == ALIVE and claim.site not in self.peers
        try:
            self._verdicts.consider(claim, now)
        finally:
            self._own.hushed = False

    # ---------------------------------------------------------------- what the parts say to each other

    def _touch(self, site: str) -> None:
        self.changes += 1
        self._follow(site)

    def _alive(self, peer: Peer, now: float) -> None:
        self._verdicts.alive(peer, now)

    def _silent(self, peer: Peer, witnessed: bool, now: float) -> None:
        self._verdicts.silent(peer, witnessed, now)

    def _condemn(self, peer: Peer, now: float) -> None:
        self._verdicts.condemn(peer, now)

    def _buried(self, peer: Peer) -> None:
        self._farewells.discard(peer.site)

    def _answered(self, waiting: Waiting, sender: Sender, now: float) -> None:
        peer = self.peers.get(sender.site)
        if waiting.why == "seed":
            self._absent.seed_answered(waiting.address, sender.site)
        elif waiting.why == "farewell":
            self._farewells.discard(sender.site)
        elif waiting.why == "contest" and peer is not None:
            self._names.defended(peer, waiting.claimant, now)

    def _farewell(self, now: float) -> None:
        waits: list[float] = []
        for site in sorted(self._farewells):
            peer = self.peers[site]
            self._prober.ping(peer.address, site, now, "farewell")
            waits.append(self._prober.patience_s(peer))
        if waits:
            self._own.timers.at(now + max(waits), self._farewell)
