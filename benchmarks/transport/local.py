"""Messages between two processes of this machine: ours beside blocking sockets and UCX's own tool."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks.transport.bare import BarePair, open_bare
from benchmarks.transport.ranks import WARM_UP, Ranks, open_ranks
from benchmarks.transport.rows import Contender, LeftOut, Options, Row, Sample, interleaved
from transport import available

SIZES = (8, 2304, 16 << 10, 256 << 10, 1 << 20, 16 << 20, 64 << 20)
QUICK = (8, 1 << 20)
SOCKET = "tcp socket"
#: UCX's own tool: with the settings of our backend, as it comes, and over TCP.
TOOL, TOOL_PLAIN, TOOL_TCP = "ucx_perftest", "ucx_perftest, its own settings", "ucx_perftest over tcp"
BARE = "ucx_bare"
WHAT = (SOCKET, TOOL, TOOL_PLAIN, TOOL_TCP, BARE, "tcp", "tcp sealed", "ucx", "ucx sealed")

#: Bytes that one measurement moves each way, and messages of it at most.
_BYTES, _MOST = 60_000_000, 500
#: From here on a row's ratio is of bandwidths, below of times.
_BULK_BYTES = 64 << 10
_TOOL_S = 30.0


def rows(options: Options) -> Iterator[Row]:
    """Rows by size. UCX is held against ucx_perftest where that is installed, all else against blocking sockets.

    "ucx_bare" is UCX as Python reaches it: a loop over UCXX's binding and nothing else.
    """
    tool = _tool()
    with ExitStack() as stack:
        bare = stack.enter_context(open_bare()) if "ucx" in available() and options.wants(BARE) else None
        pairs = {
            f"{backend}{' sealed' if seal else ''}": stack.enter_context(open_ranks(backend, 2, seal=seal))
            for backend in reversed(available())
            for seal in (False, True)
            if options.wants(f"{backend}{' sealed' if seal else ''}")
        }
        for size in QUICK if options.quick else SIZES:
            contenders = [Contender(SOCKET, partial(_sockets, size))]
            if tool is not None:
                contenders += [
                    Contender(TOOL, partial(_perftest, tool, size, _settings(), "-e")),
                    Contender(TOOL_PLAIN, partial(_perftest, tool, size, {}), TOOL),
                    Contender(TOOL_TCP, partial(_perftest, tool, size, {"UCX_TLS": "tcp"}), TOOL),
                ]
            if bare is not None:
                contenders.append(Contender(BARE, partial(_bare, bare, size), TOOL if tool is not None else SOCKET))
            for what, pair in pairs.items():
                raw = TOOL if tool is not None and what.startswith("ucx") else SOCKET
                contenders.append(Contender(what, partial(_pair, pair, size), raw))
            needed = {contender.raw for contender in contenders if options.wants(contender.what)}
            contenders = [each for each in contenders if options.wants(each.what) or each.what in needed]
            for row in interleaved(contenders, size, "loopback", options.rounds, by_time=size < _BULK_BYTES):
                if options.wants(row.what):
                    yield row


def _count(size: int) -> int:
    return max(10, min(_MOST, _BYTES // size))


def _sample(size: int, way_s: float, each_s: float) -> Sample:
    return Sample(size / each_s / 1e9, way_s * 1e6)


def _bare(pair: BarePair, size: int) -> Sample:
    count = _count(size)
    return _sample(size, pair.run("echo", size, count), pair.run("stream", size, count))


def _pair(pair: Ranks, size: int) -> Sample:
    count = _count(size)
    return _sample(size, pair.run(f"echo {size} {count}"), pair.run(f"stream {size} {count}"))


def _sockets(size: int) -> Sample:
    """Blocking sockets; the other end is a process, forked from nothing but this function's arguments."""
    count = _count(size)
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = _PEER.format(port=server.getsockname()[1], size=size, count=count, warm_up=WARM_UP)
        with subprocess.Popen([shutil.which("python3") or "python3", "-c", source]) as process:
            try:
                server.settimeout(_TOOL_S)
                near, _ = server.accept()
                with near:
                    near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    near.settimeout(_TOOL_S)
                    data, buffer = bytes(size), memoryview(bytearray(size))
                    for _ in range(WARM_UP):
                        near.sendall(data)
                        _read(near, buffer)
                    began = time.perf_counter()
                    for _ in range(count):
                        near.sendall(data)
                        _read(near, buffer)
                    way_s = (time.perf_counter() - began) / count / 2
                    began = time.perf_counter()
                    for _ in range(count):
                        near.sendall(data)
                    _read(near, buffer[:1])
                    return _sample(size, way_s, (time.perf_counter() - began) / count)
            finally:
                process.kill()


def _read(sock: socket.socket, buffer: memoryview) -> None:
    at = 0
    while at < buffer.nbytes:
        got = sock.recv_into(buffer[at:])
        if not got:
            raise LeftOut("the other end of the sockets has ended")
        at += got


_PEER = """
import socket
sock = socket.create_connection(("127.0.0.1", {port}))
sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
buffer = memoryview(bytearray({size}))
def read():
    at = 0
    while at < {size}:
        got = sock.recv_into(buffer[at:])
        if not got:
            raise SystemExit
        at += got
for _ in range({warm_up} + {count}):
    read()
    sock.sendall(buffer)
for _ in range({count}):
    read()
sock.sendall(b"x")
sock.recv(1)
"""


def _tool() -> tuple[str, dict[str, str]] | None:
    """ucx_perftest and its environment: that of the UCX that our backend uses, else the installed one, else None."""
    spec = importlib.util.find_spec("libucx")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        found = Path(folder) / "bin" / "ucx_perftest"
        if os.access(found, os.X_OK):
            return str(found), {"LD_LIBRARY_PATH": str(Path(folder) / "lib")}
    installed = shutil.which("ucx_perftest")
    return None if installed is None else (installed, {})


def _settings() -> dict[str, str]:
    """The UCX settings of our backend, as variables."""
    from transport.ucx_binding import CONFIG

    return {f"UCX_{name}": value for name, value in CONFIG.items()}


def _perftest(tool: tuple[str, dict[str, str]], size: int, settings: dict[str, str], *flags: str) -> Sample:
    way = _once(tool, "tag_lat", size, settings, *flags)[0]
    return _sample(size, way, size / max(1.0, _once(tool, "tag_bw", size, settings, *flags)[1]))


def _once(
    tool: tuple[str, dict[str, str]], test: str, size: int, settings: dict[str, str], *flags: str
) -> tuple[float, float]:
    """Seconds a message and bytes a second of one run of the tool. Raises LeftOut where it does not work."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    count = _count(size)
    command = [tool[0], "-p", port, *flags]
    environment = {**os.environ, **tool[1], **settings, "UCX_WARN_UNUSED_ENV_VARS": "n"}
    silent = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=silent, stderr=silent, env=environment) as server:
        timer = threading.Timer(_TOOL_S, server.kill)
        timer.start()
        try:
            for _ in range(50):  # until the server listens
                time.sleep(0.1)
                client = subprocess.run(
                    [*command, "127.0.0.1", "-t", test, "-s", str(size), "-n", str(count), "-w", str(WARM_UP)],
                    capture_output=True,
                    text=True,
                    env=environment,
                    timeout=_TOOL_S,
                    check=False,
                )
                figures = next((line.split() for line in client.stdout.splitlines() if line.startswith("Final")), None)
                if figures is not None:
                    # iterations, 50th percentile, average and overall us, average and overall MiB/s, messages/s
                    return float(figures[4]) / 1e6, float(figures[6]) * (1 << 20)
            raise LeftOut(f"ucx_perftest does not run here: {(client.stderr or client.stdout).strip()[:200]}")
        except subprocess.TimeoutExpired:
            raise LeftOut(f"ucx_perftest took more than {_TOOL_S:g} s") from None
        finally:
            timer.cancel()
            server.kill()
