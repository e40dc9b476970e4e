"""Faults of a virtual network as a command line names them.

    none                        nothing happens
    crash:K                     K sites vanish without a word
    slow:K:SECONDS              the processes of K sites are paused SECONDS at a time, again and again
    loss:K:FRACTION             K sites lose this share of their packets, each way
    flap-ingress:K:ON:OFF       K sites hear nothing for OFF seconds, then everything for ON seconds, alternately
    partition:SECONDS           two halves do not hear each other
    oneway:K                    K pairs work one way only

Which sites it meets, and the phase of what repeats, are drawn from the generator given.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mesh.errors import ConfigError
from simulations.network import VirtualNetwork

#: Longest pause, partition or phase that is believed: a week.
MAX_SECONDS = 7 * 86_400.0
#: Shortest phase of what repeats.
MIN_SECONDS = 0.001
#: How much the time that a slow site runs, and the length of its pauses, vary.
PAUSE_SPREAD = 0.25

_COUNT, _SECONDS, _FRACTION = "a whole number of at least 1", "seconds above 0", "a fraction between 0 and 1"
_GRAMMAR: dict[str, tuple[tuple[str, str], ...]] = {
    "none": (),
    "crash": (("K", _COUNT),),
    "slow": (("K", _COUNT), ("SECONDS", _SECONDS)),
    "loss": (("K", _COUNT), ("FRACTION", _FRACTION)),
    "flap-ingress": (("K", _COUNT), ("ON", _SECONDS), ("OFF", _SECONDS)),
    "partition": (("SECONDS", _SECONDS),),
    "oneway": (("K", _COUNT),),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. `count` sites (pairs for oneway); `first_s`, `second_s`: its seconds, in the order of the command."""

    kind: str
    count: int = 0
    first_s: float = 0.0
    second_s: float = 0.0
    fraction: float = 0.0

    def fits(self, sites: int) -> None:
        """Raise ConfigError if a mesh of so many sites cannot suffer it."""
        pairs = self.kind == "oneway"
        most = sites * (sites - 1) // 2 if pairs else sites - 1 if self.kind == "crash" else sites
        if self.count > most:
            what = "pairs" if pairs else "sites"
            why = "; one has to survive" if self.kind == "crash" and self.count == sites else ""
            raise ConfigError(
                f"--fault {self.kind}: K is {self.count}, but {sites} sites have {most} {what} for it{why}"
            )
        if self.kind == "partition" and sites < 2:
            raise ConfigError("--fault partition: it takes at least 2 sites")


@dataclass(frozen=True, slots=True)
class Struck:
    """Whom a fault met: `crashed` are gone, `bad` are alive but ill. `stop` ends it, where it can be ended."""

    crashed: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    halves: tuple[tuple[str, ...], ...] = ()
    stop: Callable[[], None] = lambda: None


def parse_fault(spec: str) -> Fault:
    """A fault from its spelling. Raises ConfigError naming the part that is wrong."""
    kind, *words = spec.split(":")
    fields = _GRAMMAR.get(kind)
    if fields is None:
        raise ConfigError(f"--fault {spec!r}: unknown fault {kind!r}, use one of {', '.join(_GRAMMAR)}")
    if len(words) != len(fields):
        form = ":".join([kind, *(name for name, _ in fields)])
        raise ConfigError(f"--fault {spec!r}: expected {form}")
    values = [_value(spec, name, demand, word) for (name, demand), word in zip(fields, words, strict=True)]
    numbers = dict(zip((name for name, _ in fields), values, strict=True))
    return Fault(
        kind,
        count=int(numbers.get("K", 0)),
        first_s=numbers.get("SECONDS", numbers.get("ON", 0.0)),
        second_s=numbers.get("OFF", 0.0),
        fraction=numbers.get("FRACTION", 0.0),
    )


def strike(net: VirtualNetwork, fault: Fault, sites: Sequence[str], chance: random.Random) -> Struck:
    """Let a fault begin now among `sites`. A partition lasts until `stop` is called, as everything but a crash does."""
    match fault.kind:
        case "crash":
            crashed = tuple(sorted(chance.sample(sites, fault.count)))
            for site in crashed:
                net.crash(site)
            return Struck(crashed=crashed)
        case "slow":
            return _slow(net, fault, sites, chance)
        case "loss":
            bad = tuple(sorted(chance.sample(sites, fault.count)))
            for site in bad:
                net.impair(site, loss=fault.fraction)
            return Struck(bad=bad, stop=net.heal)
        case "flap-ingress":
            return _flap(net, fault, sites, chance)
        case "partition":
            shuffled = chance.sample(sites, len(sites))
            half = len(sites) // 2
            halves = (tuple(sorted(shuffled[half:])), tuple(sorted(shuffled[:half])))
            net.partition(*halves)
            return Struck(halves=halves, stop=net.heal)
        case "oneway":
            return _one_way(net, fault, sites, chance)
    return Struck()


def _slow(net: VirtualNetwork, fault: Fault, sites: Sequence[str], chance: random.Random) -> Struck:
    """Pauses of SECONDS with as much time to run between, both up to 25 % longer or shorter, each site in its phase."""
    bad = tuple(sorted(chance.sample(sites, fault.count)))
    going = True

    def vary() -> float:
        return fault.first_s * (1.0 - PAUSE_SPREAD + 2.0 * PAUSE_SPREAD * chance.random())

    def pause(site: str) -> None:
        if going and site in net.nodes:
            length_s = vary()
            net.pause(site, length_s)
            net.clock.at(net.clock.now_s + length_s + vary(), pause, site)

    def stop() -> None:
        nonlocal going
        going = False

    for site in bad:
        net.clock.at(net.clock.now_s + fault.first_s * chance.random(), pause, site)
    return Struck(bad=bad, stop=stop)


def _flap(net: VirtualNetwork, fault: Fault, sites: Sequence[str], chance: random.Random) -> Struck:
    bad = tuple(sorted(chance.sample(sites, fault.count)))
    going = True

    def phase(site: str, deaf: bool) -> None:
        if going:
            net.impair(site, deaf=deaf)
            net.clock.at(net.clock.now_s + (fault.second_s if deaf else fault.first_s), phase, site, not deaf)

    def stop() -> None:
        nonlocal going
        going = False
        net.heal()

    for site in bad:
        net.clock.at(net.clock.now_s + fault.first_s * chance.random(), phase, site, True)
    return Struck(bad=bad, stop=stop)


def _one_way(net: VirtualNetwork, fault: Fault, sites: Sequence[str], chance: random.Random) -> Struck:
    """K different pairs, the direction that fails drawn too."""
    count = len(sites)
    pairs = []
    for number in sorted(chance.sample(range(count * (count - 1) // 2), fault.count)):
        # The number-th of the pairs (0,1), (0,2), (1,2), (0,3), ...
        later = (1 + math.isqrt(1 + 8 * number)) // 2
        pair = (sites[number - later * (later - 1) // 2], sites[later])
        pairs.append(pair if chance.random() < 0.5 else pair[::-1])
    for source, target in pairs:
        net.cut_one_way(source, target)
    return Struck(pairs=tuple(pairs), stop=net.heal)


def _value(spec: str, name: str, demand: str, word: str) -> float:
    wrong = ConfigError(f"--fault {spec!r}: {name} is {word!r}, expected {demand}")
    if demand is _COUNT:
        if not (word.isascii() and word.isdigit() and int(word[:10]) > 0 and len(word) < 10):
            raise wrong
        return int(word)
    try:
        value = float(word)
    except ValueError:
        raise wrong from None
    low, high = (MIN_SECONDS, MAX_SECONDS) if demand is _SECONDS else (0.0, 1.0)
    if not low <= value <= high:
        raise wrong
    return value
