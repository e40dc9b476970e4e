"""Our all-reduce beside that of torch.distributed with gloo, over processes of this machine.

Shards of one site share memory where they can ("shared memory"); elsewhere they exchange messages ("tcp", "ucx").
"""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Iterator
from contextlib import ExitStack

from benchmarks.transport.ranks import Ranks, open_ranks
from benchmarks.transport.rows import Contender, LeftOut, Options, Row, Sample, interleaved
from transport import available

RANKS = (2, 3, 4)
SHARED = "shared memory"
SIZES = (1024, 2304, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)
QUICK = (2304, 256 << 10)
WHAT = tuple(
    f"all-reduce {ranks} ranks {who}"
    for ranks in RANKS
    for who in ("gloo", SHARED, f"{SHARED} sealed", "tcp", "tcp sealed", "ucx", "ucx sealed")
)

#: Bytes that one measurement moves, and all-reduces of it at most.
_BYTES, _MOST, _GLOO_MOST = 30_000_000, 300, 50
#: Over which channels gloo's processes have met, which it does not use.
GLOO = ("tcp", False)


def rows(options: Options) -> Iterator[Row]:
    """Rows by ranks and size. `ratio_to_raw` is how many times faster than gloo. Raises LeftOut without torch."""
    if importlib.util.find_spec("torch") is None:
        raise LeftOut("torch is not installed")
    for ranks in RANKS[:1] if options.quick else RANKS:
        gloo = f"all-reduce {ranks} ranks gloo"
        ours = [
            (f"all-reduce {ranks} ranks {backend}{' sealed' if seal else ''}", backend, seal)
            for backend in (SHARED, *reversed(available()))
            for seal in (False, True)
        ]
        ours = [each for each in ours if options.wants(each[0])]
        if not ours and not options.wants(gloo):
            continue
        with ExitStack() as stack:
            # Loading torch takes longer than measuring: processes are shared by whoever uses the same channels.
            kinds = {GLOO, *((_messages(backend), seal) for _, backend, seal in ours)}
            processes = {kind: stack.enter_context(open_ranks(kind[0], ranks, seal=kind[1])) for kind in kinds}
            groups = {what: processes[_messages(backend), seal] for what, backend, seal in ours}
            port = _free_port()
            for size in QUICK if options.quick else SIZES:
                contenders = [
                    _contender(gloo, processes[GLOO], f"gloo {size} {_count(size, _GLOO_MOST)} {port}", size, None)
                ]
                contenders += [
                    _contender(what, group, f"reduce {size} {_count(size)} {int(SHARED in what)}", size, gloo)
                    for what, group in groups.items()
                ]
                yield from interleaved(contenders, size, "loopback", options.rounds)


def _contender(what: str, ranks: Ranks, task: str, size: int, raw: str | None) -> Contender:
    def measure() -> Sample:
        taken_s = ranks.run(task)
        return Sample(size / taken_s / 1e9, taken_s * 1e6)

    return Contender(what, measure, raw)


def _messages(backend: str) -> str:
    return "tcp" if backend == SHARED else backend


def _count(size: int, most: int = _MOST) -> int:
    return max(3, min(most, _BYTES // size))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
