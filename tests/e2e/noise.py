"""Random bytes, and bytes that begin like something real, at every port that processes listen on."""

import contextlib
import random
import socket
import threading
from dataclasses import dataclass

import psutil

#: How protocols begin that these ports speak: HTTP/1, HTTP/2 with a settings frame, TLS, and the transport's preface.
BEGINNINGS = (
    b"",
    b"GET / HTTP/1.1\r\nHost: x\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    b"\x16\x03\x01\x02\x00\x01",
    b"ISTHMUS1",
)
#: Connections that stay open, silent or half spoken, beside those that come and go.
HELD = 8


@dataclass
class Thrown:
    """What was thrown so far."""

    datagrams: int = 0
    connections: int = 0


def ports_of(processes):
    """The (host, port) pairs that processes listen on, over TCP and over UDP."""
    tcp, udp = set(), set()
    for process in processes:
        for at in process.net_connections("inet"):
            if at.type == socket.SOCK_STREAM and at.status == psutil.CONN_LISTEN:
                tcp.add(_reachable(at.laddr))
            elif at.type == socket.SOCK_DGRAM:
                udp.add(_reachable(at.laddr))
    return sorted(tcp), sorted(udp)


def _reachable(address):
    # gRPC and UCX listen on IPv6 sockets that take IPv4 as well, and UCX on every address.
    host = address.ip.removeprefix("::ffff:")
    return ("127.0.0.1" if host in ("0.0.0.0", "::") else host, address.port)


@contextlib.contextmanager
def make_noise(tcp, udp, *, seed):
    """Throw noise from threads for the length of the block. Gives the running count."""
    thrown, stop = Thrown(), threading.Event()
    threads = [
        threading.Thread(target=_datagrams, args=(udp, random.Random(seed), stop, thrown), daemon=True),
        threading.Thread(target=_streams, args=(tcp, random.Random(seed + 1), stop, thrown), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield thrown
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in threads)


def _datagrams(ports, rng, stop, thrown):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        while not stop.wait(0.002):
            # As often as not the first bytes are few values, as those of a real header would be.
            data = bytes(rng.randrange(4) for _ in range(rng.randrange(8))) + rng.randbytes(rng.randrange(1400))
            with contextlib.suppress(OSError):
                sock.sendto(data, rng.choice(ports))
                thrown.datagrams += 1


def _streams(ports, rng, stop, thrown):
    held = []
    try:
        while not stop.wait(0.005):
            try:
                sock = socket.create_connection(rng.choice(ports), timeout=1.0)
            except OSError:
                continue
            thrown.connections += 1
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                sock.send(rng.choice(BEGINNINGS) + rng.randbytes(rng.choice((0, 1, 40, 4000, 60000))))
            if rng.random() < 0.2:
                held.append(sock)
                if len(held) > HELD:
                    held.pop(rng.randrange(len(held))).close()
            else:
                sock.close()
    finally:
        for sock in held:
            sock.close()
