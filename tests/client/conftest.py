"""A fake peer for the clients."""

from collections.abc import Iterator

import pytest
from fake_peer import FakePeer


@pytest.fixture
def peer() -> Iterator[FakePeer]:
    """One that answers, gone after the test."""
    fake = FakePeer()
    yield fake
    fake.stop()
