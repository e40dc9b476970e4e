"""Fixtures: a pair of fabrics of each backend, connected pipes and channels."""

from __future__ import annotations

import pytest
from transport_harness import BACKENDS, connect_pair, until

from transport import open_fabric


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def fabrics(backend):
    pair = open_fabric(backend), open_fabric(backend)
    yield pair
    for fabric in pair:
        fabric.close()


@pytest.fixture
def pipes(fabrics):
    near, far = fabrics
    listener = far.listen()
    connected = near.connect(listener.address)
    connected.send((b"first",))
    accepted = until(listener.accept, near, far)
    first = until(accepted.take, near, far)
    assert bytes(first) == b"first"
    accepted.trust()
    return connected, accepted


@pytest.fixture(params=("sealed", "unsealed"))
def channels(request, fabrics):
    return connect_pair(*fabrics, key=bytes(range(32)), seal=request.param == "sealed")
