"""One stage of two, in a process and a network namespace of its own: the real step loop with a model of no substance.

`python -m benchmarks.prefill_ends NAMESPACE HOST STAGE BYTES_PER_S HIDDEN`, driven by lines of JSON on standard input.
Its hidden states have the size of a large model's and its steps take a stated time. The last stage says when tokens
come, by the machine's monotonic clock.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from typing import Any

import torch

from mesh.runtime.assignment import Assignment
from mesh.runtime.engine import Engine
from mesh.runtime.inbox import Inbox
from mesh.runtime.protocol import Connect, Event, FailureEvent, Neighbour, Prepare, Reply, Request, Start, TokenEvent
from simulations.wide_area import enter

_EPOCH = (1, "benchmark")
_KEYS = (bytes(range(32)), bytes(range(1, 33)))
_CONTEXT = 1 << 17
_CONNECT_S = 20.0
#: What a step takes, as on an accelerator: a decoding step, and a chunk of a prompt.
_STEP_S, _CHUNK_S = 2e-3, 20e-3


class _StandIn:
    """Hidden states of zeros, in the time that a step is to take."""

    def __init__(self, a: Assignment, hidden: int) -> None:
        self._a = a
        self.hidden = hidden
        self.weight_bytes = 0

    def forward(self, request: str, position: int, *, count: int | None = None, **_: Any) -> torch.Tensor:
        assert count is not None
        time.sleep(_STEP_S if count == 1 else _CHUNK_S)
        return torch.zeros(1) if self._a.last else torch.zeros((count, self.hidden), dtype=torch.bfloat16)

    def drop(self, request: str) -> None:
        """Nothing is held."""

    def drop_all(self) -> None:
        """Nothing is held."""

    def work(self, position: int) -> None:
        """Nobody asks for its pace."""


def _say(document: Any) -> None:
    print(json.dumps(document), flush=True)


def main() -> None:
    """Turn until standard input ends."""
    space, host, stage, rate, hidden = sys.argv[1:]
    enter(space)
    inbox = Inbox()
    replies: deque[Reply] = deque()

    def emit(event: Event) -> None:
        match event:
            case Reply():
                replies.append(event)
            case TokenEvent():
                _say({"request": event.request, "index": event.index, "at": time.monotonic()})
            case FailureEvent():
                _say({"failure": event.reason})

    engine = Engine(inbox, emit, load=lambda a, former, progress: _StandIn(a, int(hidden)), sample=lambda *_, **__: 1)
    lines: deque[str] = deque()
    ended = threading.Event()

    def read() -> None:
        for line in sys.stdin:
            lines.append(line)
            engine.links.wake()
        ended.set()
        engine.links.wake()

    def told(command: Any) -> dict[str, Any]:
        inbox.put(command)
        while not replies:
            if not engine.turn():
                engine.links.wait(0.02)
        return replies.popleft().check()

    a = Assignment(
        job="benchmark", epoch=_EPOCH, model="", dtype="bfloat16", device="cpu", threads=1, memory_bytes=0,
        context=_CONTEXT, stage=int(stage), stages=2, start=int(stage), end=int(stage) + 1, rank=0, size=1,
        kv_heads=(0, 1), columns=(0, 1), vocabulary=(0, 1), onward_bytes_per_s=float(rate),
    )  # fmt: skip
    addresses = told(Prepare(1, _EPOCH, a.to_dict(), ("tcp",), host))["addresses"]
    _say({"address": addresses["tcp"].hex()})
    there = bytes.fromhex(json.loads(sys.stdin.readline())["address"])
    roles = (("next", there, 0), ("previous", b"", 1)) if a.first else (("previous", b"", 0), ("next", there, 1))
    neighbours = tuple(
        Neighbour(role, 0, f"{role}/0", "tcp", address, _KEYS[wire], b"wire %d" % wire) for role, address, wire in roles
    )
    told(Connect(2, _EPOCH, neighbours, _CONNECT_S))
    _say({"connected": True})
    threading.Thread(target=read, daemon=True).start()
    number = 2
    while not ended.is_set():
        while lines:
            order = json.loads(lines.popleft())
            number += 1
            prompt = (1,) * order["prompt"]
            inbox.put(Start(number, _EPOCH, Request(order["request"], prompt, len(prompt), order["tokens"])))
        if not engine.turn():
            engine.links.wait(0.25)


if __name__ == "__main__":
    main()
