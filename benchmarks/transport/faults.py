"""Random faults on every backend of the transport, and what must hold after each.

    python -m benchmarks.transport.faults [--count N] [--seed N] [--backend NAME]... [--json]

Each fault meets a fresh sealed channel with messages on their way both ways: an end is cancelled in the middle, dies
with its fabric, stalls, goes silent as a half-open link does, or a frame is changed on its way. Whoever waits must get
its message or an exception within the deadline, what is received must be what was sent, and no descriptor may be left.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transport import Acceptor, Channel, Fabric, TransportError, available, connect_channel, open_fabric

FAULTS = ("none", "cancel", "kill", "stall", "half-open", "corrupt")

#: How long a wait may take, what the machine may be late by, and how long a silent neighbour is borne.
_DEADLINE_S, _LATE_S, _SILENCE_S = 0.08, 3.0, 0.05
_SIZES = (0, 100, 5000, 70_000, 600_000)


def run(backend: str, count: int, seed: int) -> dict[str, Any]:
    """`count` faults; how they ended, and what was found wrong (nothing, if all is well)."""
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    _one(backend, "none", rng)  # what is opened once and kept
    before = _descriptors()
    slowest_s = 0.0
    for index in range(count):
        fault = rng.choice(FAULTS)
        began = time.monotonic()
        try:
            outcome = _one(backend, fault, rng)
        except AssertionError as error:
            outcome = f"wrong: {error}"
            wrong.append(f"{backend} {fault} {index}: {error}")
        slowest_s = max(slowest_s, time.monotonic() - began)
        outcomes[f"{fault}: {outcome}"] += 1
    left = _descriptors() - before
    if left > 0:
        wrong.append(f"{backend}: {left} descriptors left")
    return {
        "backend": backend,
        "count": count,
        "slowest_s": round(slowest_s, 3),
        "outcomes": dict(sorted(outcomes.items())),
        "wrong": wrong,
    }


def _one(backend: str, fault: str, rng: random.Random) -> str:
    near_fabric, far_fabric = open_fabric(backend), open_fabric(backend)
    for fabric in (near_fabric, far_fabric):
        if hasattr(fabric, "linger_s"):
            fabric.linger_s = 0.01
    try:
        near, far = _channels(near_fabric, far_fabric)
        return _meet(near, far, fault, rng)
    finally:
        near_fabric.close()
        far_fabric.close()


def _channels(near_fabric: Fabric, far_fabric: Fabric) -> tuple[Channel, Channel]:
    acceptor = Acceptor(far_fabric, far_fabric.listen())
    key = os.urandom(32)
    acceptor.expect(b"hello", name="near", key=key, silence_s=_SILENCE_S)
    near = connect_channel(near_fabric, acceptor.address, name="far", key=key, hello=b"hello", silence_s=_SILENCE_S)
    made: list[Channel] = []
    deadline = time.monotonic() + _LATE_S
    while not made or not near.established:
        near_fabric.progress()
        near.check()
        made += [channel for _, channel in acceptor.poll()]
        assert time.monotonic() < deadline, "no channel within the deadline"
    acceptor.close()
    return near, made[0]


def _meet(near: Channel, far: Channel, fault: str, rng: random.Random) -> str:
    near_fabric = near.fabric
    sent = [rng.randbytes(rng.choice(_SIZES)) for _ in range(4)]
    at = rng.randrange(len(sent))
    drive = True
    for index, payload in enumerate(sent):
        if index == at:
            if fault == "cancel":
                near.abort()
                break
            if fault == "kill":
                near_fabric.close()
                break
            if fault in ("stall", "half-open"):
                drive = False
                break
            if fault == "corrupt":
                _corrupt(near, rng)
        near.send(b"%d" % index, payload)
    got = 0
    began = time.monotonic()
    while got < len(sent):
        if drive and fault != "kill":
            near_fabric.progress()
        try:
            message = far.poll()
        except TransportError as error:
            return type(error).__name__
        if message is not None:
            assert bytes(message.payload) == sent[int(message.meta)], "another payload than was sent"
            assert fault != "corrupt" or got != at, "a corrupted frame was accepted"
            got += 1
        elif time.monotonic() - began > _DEADLINE_S and not drive and fault == "stall":
            return "deadline"
        assert time.monotonic() - began < _DEADLINE_S + _LATE_S, "still waiting long after the deadline"
    return "delivered"


def _corrupt(channel: Channel, rng: random.Random) -> None:
    """Change one bit of the next frame."""
    pipe: Any = channel._pipe
    genuine = pipe.send

    def send(parts: Sequence[Any]) -> Any:
        pipe.send = genuine
        message = bytearray(b"".join(parts))
        message[rng.randrange(len(message))] ^= 1 << rng.randrange(8)
        return genuine((bytes(message),))

    pipe.send = send


def _descriptors() -> int:
    gc.collect()
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was found; exit code 1 where something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transport.faults", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="faults in all (10000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", action="append", choices=("memory", "tcp", "ucx"), help="these alone")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    options = parser.parse_args(arguments)
    backends = options.backend or ["memory", *reversed(available())]
    share = -(-options.count // len(backends))
    found = [run(backend, share, options.seed) for backend in backends]
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        for each in found:
            print(f"{each['backend']}: {each['count']} faults, slowest {each['slowest_s']} s")
            for outcome, times in [*each["outcomes"].items(), *((line, "!") for line in each["wrong"])]:
                print(f"  {outcome}  {times}")
    return 1 if any(each["wrong"] for each in found) else 0


if __name__ == "__main__":
    sys.exit(main())
