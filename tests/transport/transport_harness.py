"""Helpers: connected pairs, waiting with a deadline, and neighbours in other processes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from transport import Acceptor, connect_channel, open_fabric

UCX = pytest.param(
    "ucx",
    marks=pytest.mark.skipif(importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed (extra `ucx`)"),
)
BACKENDS = ("memory", "tcp", UCX)
PROCESSES = ("tcp", UCX)
CHILD = Path(__file__).with_name("transport_neighbour.py")


def until(condition, *fabrics, timeout_s=10.0):
    """Progress the fabrics until the condition gives something, and give that."""
    deadline = time.monotonic() + timeout_s
    while True:
        for fabric in fabrics:
            fabric.progress()
        result = condition()
        if result:
            return result
        assert time.monotonic() < deadline, "it did not happen in time"


def connect_pair(near, far, *, key=None, **options):
    """Two channels, connector's end first."""
    acceptor = Acceptor(far, far.listen())
    acceptor.expect(b"hello", name="connector", key=key, **options)
    channel = connect_channel(near, acceptor.address, name="acceptor", key=key, hello=b"hello", **options)
    ((hello, accepted),) = until(acceptor.poll, near, far)
    assert hello == b"hello"
    until(lambda: channel.check() or channel.established, near, far)
    acceptor.close()
    return channel, accepted


class Neighbour:
    """A child process with the connecting end of a channel; `channel` is this end."""

    def __init__(self, backend, mode, key=None):
        self.fabric = open_fabric(backend)
        acceptor = Acceptor(self.fabric, self.fabric.listen())
        acceptor.expect(b"child", name="child", key=key)
        self.process = subprocess.Popen(
            [sys.executable, str(CHILD), backend, mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )
        self.process.stdin.write(f"{acceptor.address.hex()} {key.hex() if key else '-'}\n")
        self.process.stdin.flush()
        try:
            ((_, self.channel),) = until(acceptor.poll, timeout_s=60)
        except BaseException:
            self.__exit__()
            raise
        acceptor.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.fabric.close()
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
