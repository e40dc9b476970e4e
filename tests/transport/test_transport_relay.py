"""A relay hands on what two channels say, to one place and to nobody without the cookie, within its bounds."""

import json
import socket
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport import Acceptor, AddressError, ChannelBroken, connect_channel, open_fabric
from transport.relay import Rate, endpoint, readdressed

KEY = bytes(range(32))


class RelayProcess:
    def __init__(self, bytes_per_s=1e9):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "transport.relay", "127.0.0.1", str(bytes_per_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        assert self.process.wait(20) == 0
        self.process.stdout.close()

    def forward(self, host, port, cookie=b""):
        order = {"id": 1, "open": [host, port], "cookie": cookie.hex() or None}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())["port"]

    def channel_address(self, address):
        host, port, cookie = endpoint(address)
        return readdressed(address, "127.0.0.1", self.forward(host, port, cookie))


@pytest.fixture
def fabrics():
    opened = [open_fabric("tcp"), open_fabric("tcp")]
    yield opened
    for fabric in opened:
        fabric.close()


def joined(relay, fabrics):
    """Both ends of a channel whose connector only knows the relay."""
    listening, connecting = fabrics
    acceptor = Acceptor(listening, listening.listen())
    acceptor.expect(b"x", name="connector", key=KEY)
    near = connect_channel(connecting, relay.channel_address(acceptor.address), name="far", key=KEY, hello=b"x")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        near.poll()
        for _, far in acceptor.poll():
            return near, far
        listening.wait(0.01)
    raise AssertionError("the channel was not made")


def pump(channel, other):
    """Drive both ends until one message has come."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        other.poll()
        message = channel.poll()
        if message is not None:
            return message
        time.sleep(0.0005)
    raise AssertionError("nothing arrived")


def test_a_sealed_channel_works_through_a_relay(fabrics):
    with RelayProcess() as relay:
        near, far = joined(relay, fabrics)
        for size in (0, 100, 3 << 20):
            near.send(b"there", bytes(size))
            assert pump(far, near).payload.nbytes == size
            far.send(b"back", bytes(size))
            assert pump(near, far).payload.nbytes == size


def test_a_relay_that_dies_is_a_break_at_both_ends(fabrics):
    with RelayProcess() as relay:
        near, far = joined(relay, fabrics)
        relay.process.stdin.close()
        relay.process.wait(20)
        for channel in (near, far):
            with pytest.raises(ChannelBroken):
                channel.receive(20)


def test_an_abort_reaches_the_other_end(fabrics):
    with RelayProcess() as relay:
        near, far = joined(relay, fabrics)
        near.abort()
        with pytest.raises(ChannelBroken):
            far.receive(20)


def test_a_stranger_without_the_cookie_reaches_nobody():
    with socket.create_server(("127.0.0.1", 0)) as target, RelayProcess() as relay:
        target.settimeout(0.3)
        port = relay.forward("127.0.0.1", target.getsockname()[1], bytes(16))
        for noise in (b"x" * 24, b"GET / HTTP/1.1\r\n\r\n" + bytes(24)):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(noise)
                stranger.settimeout(20)
                try:
                    assert stranger.recv(1) == b""
                except ConnectionResetError:
                    pass
        with pytest.raises(TimeoutError):
            target.accept()


def test_a_half_that_ends_is_ended_on_the_other_side():
    with socket.create_server(("127.0.0.1", 0)) as target, RelayProcess() as relay:
        port = relay.forward("127.0.0.1", target.getsockname()[1])

        def echo():
            connection, _ = target.accept()
            with connection:
                said = b""
                while data := connection.recv(4096):
                    said += data
                connection.sendall(said.upper())

        thread = threading.Thread(target=echo)
        thread.start()
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"hello")
            client.shutdown(socket.SHUT_WR)
            client.settimeout(20)
            assert client.recv(100) == b"HELLO"
            assert client.recv(100) == b""
        thread.join(20)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1 << 20)), max_size=40), st.floats(1e3, 1e9))
@settings(max_examples=50)
def test_no_more_passes_than_the_rate_allows(script, bytes_per_s):
    rate, now, passed = Rate(bytes_per_s), 0.0, 0
    for gap_s, size in script:
        now += gap_s
        now += rate.wait_s(size, now)
        passed += size
        assert passed <= bytes_per_s * (now + 0.1) * 1.001 + 1


@given(st.binary(max_size=60))
@settings(max_examples=50)
def test_what_is_no_address_is_refused(data):
    for address in (data, b"tcp1" + data):
        try:
            host, port, cookie = endpoint(address)
        except AddressError:
            continue
        assert endpoint(readdressed(address, host, port)) == (host, port, cookie)
