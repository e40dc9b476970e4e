"""This peer itself: its own word, its health, and what the parts of membership share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from mesh.gossip import config
from mesh.gossip.members import ALIVE, LEFT, Claim
from mesh.gossip.messages import Message, Rumour
from mesh.gossip.roster import Roster
from mesh.gossip.rumours import Rumours
from mesh.gossip.timers import Timers

#: Requests to helpers by whose fate we judge our own paths, and how many there must be for a judgement.
SIGHT_WINDOW = 12
SIGHT_LEAST = 6
#: Below this share of answers from helpers that nobody suspects, the fault is most likely with us. A site that loses
#: 80 % of its packets gets 4 of 100 answers; one that loses 10 % gets 81.
SIGHT_SHARE = 0.5


class Own:
    """See the module. `send(address, message)` queues, `ask` queues a request over a stream (False: there are none),
    `emit(kind, site)` tells the user, `touched(site)` follows every change of who lives at which incarnation, `prove`
    signs our own claim."""

    def __init__(
        self,
        settings: config.GossipConfig,
        address: str,
        timers: Timers,
        *,
        send: Callable[[str, Message], None],
        emit: Callable[[str, str], None],
        pack: Callable[[Message], bytes],
        touched: Callable[[str], None],
        prove: Callable[[Claim], Claim],
        ask: Callable[[str, str, Iterable[Message]], bool],
    ) -> None:
        """`address` is the one really bound."""
        self.site = settings.site
        self.address = address
        self.incarnation = settings.incarnation
        self.left = False
        self.hushed = False
        self.taken_by: str | None = None
        self.health = 0
        self.heard_s = float("-inf")
        self.t = settings.timing
        self.rng = settings.rng
        self.timers = timers
        self.roster = Roster()
        self.rumours = Rumours()
        self.send = send
        self.emit = emit
        self.touched = touched
        self.ask = ask
        self._pack = pack
        self._prove = prove
        self._said: Claim | None = None
        self._asked: deque[bool] = deque(maxlen=SIGHT_WINDOW)

    @property
    def quiet(self) -> bool:
        """Whether we have left, or given way to another of our name, and look after nobody any more."""
        return self.left or self.taken_by is not None

    def claim(self) -> Claim:
        """What we say of ourselves."""
        said = self._said
        state = LEFT if self.left else ALIVE
        if said is None or said.incarnation != self.incarnation or said.state != state:
            said = self._said = self._prove(Claim(self.site, self.address, state, self.incarnation))
        return said

    def tell(self, claim: Claim) -> None:
        """Spread a claim, unless nothing of it is news to others."""
        if self.hushed and claim.site != self.site:
            return
        self.rumours.add(claim, self._pack(Rumour(claim)), len(self.roster) + 1)

    def jitter(self, delay_s: float) -> float:
        """A delay with a tenth of chance either way, so that peers do not act in step."""
        return delay_s * (0.9 + 0.2 * self.rng.random())

    # ---------------------------------------------------------------- local health (Lifeguard, section IV-A)

    def well(self) -> None:
        """A probe of ours succeeded."""
        self.health = max(0, self.health - 1)

    def unwell(self, points: int) -> None:
        """Something shows that we are too slow, or cannot be heard."""
        self.health = min(self.t.max_health, self.health + points)

    def helped(self, answered: bool) -> None:
        """A helper that nobody suspects has answered a request of ours, or has not."""
        self._asked.append(answered)

    @property
    def clouded(self) -> bool:
        """Whether our own paths are so bad that we cannot judge who is silent.

        A site that is cut off or loses most packets sees everybody silent. It then neither accuses in public nor
        condemns on its own (Rapid, Suresh et al., section 2, shows what becomes of a mesh in which it does).
        """
        asked = self._asked
        return not self.t.fixed and len(asked) >= SIGHT_LEAST and sum(asked) < SIGHT_SHARE * len(asked)
