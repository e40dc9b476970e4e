"""What makes one plan better than another, and by how far a plan misses the limits that were set.

| objective | least or most |
|---|---|
| `latency` | seconds a token, batch of one |
| `throughput` | tokens a second over many requests, with every stage busy |
| `first_token` | seconds until the first token of a prompt of 512 tokens |
| `cost` | price a token: price an hour of all devices and sites, over the tokens of an hour at that rate |
| `balanced` | the product of seconds a token and seconds between tokens at saturation: halving one is worth doubling the other |
| `fewest_sites` | sites, then seconds a token: the default |

A rate is bound by the slowest stage or hop, and by Little's law where `concurrency` says how many requests there are:
min(1 / slowest, requests / token seconds). A plan of devices that cost nothing is as cheap as any other such plan; then
the latency decides. Ties go to fewer sites, fewer stages, and at last to names: the same everywhere.
"""  # noqa: E501 - a table row cannot be broken

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from topology.candidate import Candidate
    from topology.constraints import Constraints

#: How much more a token may take so that stages come out even, by objective: every one is tried, the best kept.
#: Calibration repeats to a few per cent, so smaller differences between devices are not worth lopsided stages.
SLACKS: Final[dict[str, tuple[float, ...]]] = {
    "latency": (0.0,),
    "fewest_sites": (0.05,),
    "throughput": (math.inf,),
    "first_token": (0.0,),
    "cost": (math.inf, 0.05),
    "balanced": (0.01, 0.1, 0.3, math.inf),
}
#: Tried besides where a limit is missed otherwise.
LIMITED_SLACKS: Final = (0.0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.8, math.inf)

Key = tuple[object, ...]


def key(candidate: Candidate, wish: str) -> Key:
    """Sorts the better plan first: what misses no limit, then by `wish`. In nanos, so that rounding cannot decide."""
    token = _nano(candidate.token_s)
    sites = len(candidate.sites)
    rest = (len(candidate.fits), _nano(candidate.slowest_s), candidate.identity)
    missed = _nano(candidate.excess)
    if wish == "latency":
        return (missed, token, sites, *rest)
    if wish == "fewest_sites":
        return (missed, sites, token, *rest)
    if wish == "throughput":
        return (missed, _nano(1 / candidate.rate), sites, token, *rest)
    if wish == "first_token":
        return (missed, _nano(candidate.first_token_s), token, sites, *rest)
    if wish == "cost":
        return (missed, _nano(candidate.price_per_token * 1e6), token, sites, *rest)
    return (missed, _nano(math.log(candidate.token_s / candidate.rate)), sites, token, *rest)


def value(candidate: Candidate, wish: str) -> float:
    """The figure that `wish` makes least, to weigh two plans by their ratio. Sites do not count."""
    if wish == "throughput":
        return 1 / candidate.rate
    if wish == "first_token":
        return candidate.first_token_s
    if wish == "cost" and candidate.price_per_hour > 0:
        return candidate.price_per_token
    if wish == "balanced":
        return math.sqrt(candidate.token_s / candidate.rate)
    return candidate.token_s


def excess(candidate: Candidate, constraints: Constraints) -> float:
    """How far the limits are missed: the sum of the logarithms of what is too much over what is allowed; 0 is within.

    The rate of one ring is no limit where more rings may be added.
    """
    pairs = [
        (candidate.token_s * 1e3, constraints.max_token_latency_ms),
        (candidate.first_token_s * 1e3, constraints.max_first_token_ms),
        (candidate.price_per_hour, constraints.max_price_per_hour),
    ]
    total = math.fsum(math.log(took / limit) for took, limit in pairs if limit is not None and took > limit)
    least = constraints.min_tokens_per_s
    if least is not None and constraints.replicas in (None, 1) and candidate.rate < least:
        total += math.log(least / candidate.rate)
    return total


def _nano(figure: float) -> int:
    return round(figure * 1e9)
