"""How long a suspect may stay silent before it is declared dead (Lifeguard, Dadgar et al., section IV-B)."""

from __future__ import annotations

import math

from mesh.gossip.timers import Timer


class Suspicion:
    """A timeout that starts patient and shortens with every independent accuser.

    timeout = max(min, max - (max - min) * ln(C + 1) / ln(k + 1)) with C confirmations beside the first accuser and k of
    them expected. memberlist switches this off below six members, exactly where a mesh of sites lives; here k is what
    the mesh can give: with three sites one confirmation brings the timeout down to its minimum.
    """

    def __init__(self, now: float, *, accuser: str, wanted: int, min_s: float, max_s: float, lone_s: float) -> None:
        """`wanted`: confirmations that bring the wait down to `min_s`; where it is 0, it is `lone_s`. Seconds."""
        self.started_s = now
        self.timer: Timer | None = None
        #: A probe of our own has failed; a helper has seen the same; we have told others.
        self.checked = self.witnessed = self.said = False
        self.verdicts: set[str] = set()
        self._accusers = {accuser}
        self._wanted = wanted
        self._min_s = min_s
        self._max_s = max_s
        self._lone_s = lone_s

    @property
    def accusers(self) -> frozenset[str]:
        """Who counts."""
        return frozenset(self._accusers)

    def confirm(self, accuser: str) -> bool:
        """Count another accuser. True if it is a new one and still shortens the wait."""
        if not accuser or accuser in self._accusers or len(self._accusers) > self._wanted:
            return False
        self._accusers.add(accuser)
        return True

    @property
    def deadline_s(self) -> float:
        """When the suspect counts as dead."""
        if self._wanted <= 0:
            return self.started_s + self._lone_s
        share = math.log(len(self._accusers)) / math.log(self._wanted + 1)
        return self.started_s + max(self._min_s, self._max_s - (self._max_s - self._min_s) * share)
