"""When the measured links of a peer have changed enough to be published again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mesh.gossip.rtt import Rtt

#: Below this a change of RTT or jitter is scheduling noise.
NOISE_S = 0.5e-3


class Links:
    """The links last published, and whether new measurements differ from them."""

    def __init__(self) -> None:
        self._published: dict[str, Rtt] | None = None

    def changed(self, rtts: Mapping[str, Rtt]) -> dict[str, Any] | None:
        """The document {site: {"rtt_s", "jitter_s", "loss"}} to publish, or None if the last one still holds.

        It still holds while the same sites are measured, their minimum moved by less than 5 %, their jitter by less
        than a half (or 5 % of the minimum) and their loss by less than 0.1.
        """
        old = self._published
        if not rtts and old is None:
            return None
        if old is not None and old.keys() == rtts.keys() and not any(_differs(old[s], rtts[s]) for s in rtts):
            return None
        self._published = dict(rtts)
        return {
            site: {"rtt_s": round(rtt.min_s, 6), "jitter_s": round(rtt.jitter_s, 6), "loss": round(rtt.loss, 3)}
            for site, rtt in sorted(rtts.items())
        }


def _differs(old: Rtt, new: Rtt) -> bool:
    moved = abs(new.min_s - old.min_s) > max(NOISE_S, 0.05 * old.min_s)
    spread = abs(new.jitter_s - old.jitter_s) > max(2 * NOISE_S, 0.5 * old.jitter_s, 0.05 * old.min_s)
    return moved or spread or abs(new.loss - old.loss) > 0.1
