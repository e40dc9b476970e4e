"""What only TCP can suffer: strangers."""

from __future__ import annotations

import random
import socket
import struct
import time

import pytest
from transport_harness import until

from transport import AddressError, ChannelBroken, open_fabric
from transport.tcp import _ADDRESS, _MAGIC, _PREFIX


@pytest.fixture
def fabric():
    fabric = open_fabric("tcp")
    yield fabric
    fabric.close()


def endpoint(address):
    cookie, port = _ADDRESS.unpack_from(address, len(_PREFIX))
    return address[len(_PREFIX) + _ADDRESS.size :].decode(), port, cookie


def test_random_bytes_at_the_listener_change_nothing(fabric):
    listener = fabric.listen()
    host, port, cookie = endpoint(listener.address)
    rng = random.Random(1)
    hostile = [rng.randbytes(rng.randrange(1, 400)) for _ in range(60)]
    hostile += [
        _MAGIC,
        _MAGIC + bytes(33),
        _MAGIC + cookie[:-1] + bytes([cookie[-1] ^ 1]) + bytes(17),
        _MAGIC + cookie + bytes(16) + b"\1",
        b"GET / HTTP/1.1\r\n\r\n",
    ]
    sockets = []
    for data in hostile:
        sock = socket.create_connection((host, port))
        sock.sendall(data)
        sockets.append(sock)
        fabric.progress()
    for _ in range(50):
        fabric.progress()
    assert listener.accept() is None
    pipe = fabric.connect(listener.address)
    pipe.send((b"honest",))
    accepted = until(listener.accept, fabric)
    assert bytes(until(accepted.take, fabric)) == b"honest"
    for sock in sockets:
        sock.close()


@pytest.mark.parametrize(
    "record", [struct.pack("<Q", 1 << 56 | 1 << 40), struct.pack("<Q", 77 << 56 | 5), b"\xff" * 64]
)
def test_a_record_no_honest_end_sends_breaks_only_its_pipe(fabric, record):
    listener = fabric.listen()
    host, port, cookie = endpoint(listener.address)
    with socket.create_connection((host, port)) as sock:
        sock.sendall(_MAGIC + cookie + bytes(17))
        accepted = until(listener.accept, fabric)
        accepted.trust()
        sock.sendall(record)
        with pytest.raises(ChannelBroken, match="protocol"):
            until(accepted.take, fabric)


def test_a_silent_stranger_is_dropped_after_a_while(fabric, monkeypatch):
    monkeypatch.setattr("transport.tcp._STRANGER_S", 0.05)
    listener = fabric.listen()
    host, port, _ = endpoint(listener.address)
    with socket.create_connection((host, port)) as sock:
        until(lambda: listener._strangers, fabric)
        until(lambda: not listener._strangers, fabric)
        sock.settimeout(1)
        assert sock.recv(1) == b""


def test_strangers_are_few_at_a_time(fabric):
    listener = fabric.listen()
    host, port, _ = endpoint(listener.address)
    sockets = [socket.create_connection((host, port)) for _ in range(100)]
    for _ in range(20):
        fabric.progress()
    assert len(listener._strangers) <= 64
    for sock in sockets:
        sock.close()


def test_nobody_listening_is_an_address_error_on_use(fabric):
    listener = fabric.listen()
    address = listener.address
    listener.close()
    try:
        pipe = fabric.connect(address)
        with pytest.raises(AddressError, match="nobody listens"):
            until(pipe.take, fabric)
    except AddressError as error:
        assert "refused" in str(error)


def test_a_host_name_is_refused_because_looking_it_up_would_block(fabric):
    with pytest.raises(AddressError, match="numeric"):
        fabric.listen("localhost")


def test_a_neighbour_that_never_completes_the_connection_is_given_up(fabric, monkeypatch):
    monkeypatch.setattr("transport.tcp_pipe.CONNECT_S", 0.05)
    blocked = socket.socket()
    blocked.bind(("127.0.0.1", 0))
    blocked.listen(0)
    fillers = []
    for _ in range(3):  # a full backlog: the kernel leaves further connections unanswered
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex(blocked.getsockname())
        fillers.append(filler)
    time.sleep(0.05)
    address = _PREFIX + _ADDRESS.pack(bytes(16), blocked.getsockname()[1]) + b"127.0.0.1"
    pipe = fabric.connect(address)
    with pytest.raises(ChannelBroken, match="no connection within"):
        until(pipe.take, fabric)
    for sock in (blocked, *fillers):
        sock.close()
