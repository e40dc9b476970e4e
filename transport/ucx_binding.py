"""UCXX's low-level binding, imported the one way that keeps its settings ours, and the settings.

Importing ucxx puts settings of its own into the environment (UCX_RNDV_THRESH=8192 among them), where a context and
every child process would take them for the operator's. So it is read before the import and cleaned after it.
"""

from __future__ import annotations

import os
from pathlib import Path

#: The UCX settings that whoever started this process made. They overrule `CONFIG`.
OPERATORS = frozenset(name for name in os.environ if name.startswith("UCX_"))

# UCX logs to standard output unless told otherwise, and a worker's standard output is a protocol.
os.environ.setdefault("UCX_LOG_FILE", "stderr")
os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")

from ucxx._lib import libucxx as ucx  # noqa: E402
from ucxx._lib.arr import Array  # noqa: E402

__all__ = ["CONFIG", "OPERATORS", "Array", "network_devices", "ucx"]

#: UCX settings, each overruled by its UCX_* environment variable. Rendezvous costs a round trip before the data: at
#: 80 ms, 16 KB took 246 ms with UCX's default and 82 ms without; so never between machines. Inside one, 16 KB there and
#: back took 62 us with the 8 KiB that ucxx sets and 23 us with 256 KiB. UCX's own keep-alive period is 20 s.
#:
#: Endpoints have error handling on (see `transport.ucx`), and UCX's shared memory takes part in that only when told to:
#: otherwise UCX falls back to TCP over loopback inside a machine (8 B one way 15 us instead of 8, 1 MiB 910 us instead
#: of 80). A neighbour that dies there is noticed by the keep-alives, which look whether its process exists.
#:
#: What is copied through shared memory passes a queue of segments of 8 KiB. UCX's 256 of them fill a core's cache of
#: 2 MiB, and Python's code leaves it with every message: 1 MiB messages went at 5.6 GB/s, and at 6.3 with half as many.
#: Both ends have to have the same number.
CONFIG = {
    "RNDV_THRESH": "intra:256k,inter:inf",
    "KEEPALIVE_INTERVAL": "250ms",
    "SYSV_ERROR_HANDLING": "y",
    "POSIX_ERROR_HANDLING": "y",
    "SYSV_FIFO_SIZE": "128",
    "POSIX_FIFO_SIZE": "128",
}
for _name in CONFIG:
    if f"UCX_{_name}" not in OPERATORS:
        os.environ.pop(f"UCX_{_name}", None)


def network_devices(host: str | None) -> dict[str, str]:
    """The UCX setting that keeps it on the interface that has `host`: on its own it has picked docker bridges.

    Empty where that would lose something: no host, a wildcard, an unknown address, or a machine with RDMA devices,
    whose names UCX knows better (ucx#9383, #6695).
    """
    infiniband = Path("/sys/class/infiniband")
    if host is None or host in ("0.0.0.0", "::") or (infiniband.is_dir() and any(infiniband.iterdir())):
        return {}
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.split("%")[0] == host for address in addresses):
            return {"NET_DEVICES": name}
    return {}
