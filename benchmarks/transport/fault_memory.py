"""Faults of pipes in memory: both ends are in this process; nothing is killed, but left alone, emptied, changed."""

from __future__ import annotations

import gc
import os
import random
import time
from collections import Counter
from typing import Any

from benchmarks.transport.fault_ends import corrupt, descriptors
from transport import Acceptor, Channel, ChannelBroken, Fabric, TransportError, connect_channel, open_fabric

FAULTS = ("none", "cancel", "kill", "stall", "half-open", "corrupt")
_PATIENCE_S, _LATE_S = 0.05, 3.0
_SIZES = (0, 100, 5000, 70_000, 600_000)
_COUNT = 4


def in_memory(count: int, seed: int) -> dict[str, Any]:
    """As `faults.run`."""
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    _one("none", rng)  # what is opened once and kept
    before, slowest_s, over_s = _left(), 0.0, 0.0
    for index in range(count):
        fault = rng.choice(FAULTS)
        began = time.monotonic()
        try:
            outcome = _one(fault, rng)
        except AssertionError as error:
            outcome = f"wrong: {error}"
            wrong.append(f"memory {fault} {index}: {error}")
        took_s = time.monotonic() - began
        slowest_s, over_s = max(slowest_s, took_s), max(over_s, took_s - 3 * _PATIENCE_S)
        outcomes[f"{fault}: {outcome}"] += 1
    after = _left()
    for name, figure in after.items():
        if figure > before[name]:
            wrong.append(f"memory: {figure} {name} left, {before[name]} before")
    return {
        "backend": "memory",
        "count": count,
        "processes": 0,
        "beyond_deadline_s": round(max(0.0, over_s), 3),
        "slowest_s": round(slowest_s, 3),
        "before": before,
        "after": after,
        "outcomes": dict(sorted(outcomes.items())),
        "wrong": wrong,
    }


def _left() -> dict[str, int]:
    gc.collect()
    return {
        "channels": sum(type(each) is Channel for each in gc.get_objects()),
        "descriptors": descriptors(),
    }


def _one(fault: str, rng: random.Random) -> str:
    near_fabric, far_fabric = open_fabric("memory"), open_fabric("memory")
    try:
        near, far = _channels(near_fabric, far_fabric)
        return _meet(near, far, fault, rng)
    finally:
        near_fabric.close()
        far_fabric.close()


def _channels(near_fabric: Fabric, far_fabric: Fabric) -> tuple[Channel, Channel]:
    acceptor = Acceptor(far_fabric, far_fabric.listen())
    key = os.urandom(32)
    acceptor.expect(b"hello", name="near", key=key, patience_s=_PATIENCE_S)
    near = connect_channel(near_fabric, acceptor.address, name="far", key=key, hello=b"hello", patience_s=_PATIENCE_S)
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
    sent = [rng.randbytes(rng.choice(_SIZES)) for _ in range(_COUNT)]
    at = rng.randrange(_COUNT)
    bulk = rng.random() < 0.5
    for index, payload in enumerate(sent):
        if index == at:
            if fault == "cancel":
                near.abort()
                break
            if fault == "kill":
                near.fabric.close()
                break
            if fault == "half-open":
                _swallow(near)
            if fault == "corrupt":
                corrupt(near, rng)
        near.send(b"%d" % index, payload, bulk=bulk)
    if fault == "stall":  # the far end does not look: the near one must notice, and the far one then too
        near.send(b"", bytes(1000))
        try:
            near.receive()
        except TransportError as error:
            near.abort()
            _until_broken(far)
            return type(error).__name__
        raise AssertionError("nobody noticed a neighbour that takes nothing")
    return _receive_all(far, near, sent)


def _receive_all(far: Channel, near: Channel, sent: list[bytes]) -> str:
    got = 0
    while got < len(sent):
        near.fabric.progress()
        try:
            message = far.poll() or far.receive()
        except TransportError as error:
            return type(error).__name__
        if not message.meta:
            continue
        assert bytes(message.payload) == sent[int(message.meta)], "another payload than was sent"
        got += 1
    return "delivered"


def _until_broken(channel: Channel) -> None:
    for _ in range(2 * _COUNT):
        try:
            channel.receive()
        except ChannelBroken:
            return
    raise AssertionError("an end whose neighbour is gone was not told")


def _swallow(channel: Channel) -> None:
    """Let nothing that this end sends from here on arrive."""
    pipe: Any = channel._pipe
    pipe._other._deliver = lambda message: None
