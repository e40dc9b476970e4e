"""A few published round trips between cloud regions, for drills that want believable distances.

Milliseconds between AWS regions in January 2019, as cloudping.co published them and ConsenSys/wittgenstein (Apache-2.0)
keeps them. They are typed in as figures: nothing is read or fetched at run time.
"""

from __future__ import annotations

#: Round trip in milliseconds by unordered pair of regions.
RTT_MS: dict[frozenset[str], float] = {
    frozenset(pair): rtt
    for pair, rtt in {
        ("frankfurt", "london"): 13.0,
        ("frankfurt", "ireland"): 24.0,
        ("frankfurt", "virginia"): 88.0,
        ("frankfurt", "oregon"): 164.0,
        ("frankfurt", "singapore"): 162.0,
        ("london", "ireland"): 12.0,
        ("london", "virginia"): 75.0,
        ("london", "oregon"): 141.0,
        ("london", "singapore"): 171.0,
        ("ireland", "virginia"): 80.0,
        ("ireland", "oregon"): 131.0,
        ("ireland", "singapore"): 174.0,
        ("virginia", "oregon"): 81.0,
        ("virginia", "singapore"): 232.0,
        ("oregon", "singapore"): 165.0,
    }.items()
}


def rtt_ms(one: str, other: str) -> float:
    """The published round trip between two regions in milliseconds, 0 within one. KeyError for an unknown pair."""
    return 0.0 if one == other else RTT_MS[frozenset((one, other))]
