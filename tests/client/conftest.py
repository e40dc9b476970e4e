"""A fake peer for the clients."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_peer import FakePeer


@pytest.fixture
def peer() -> Iterator[FakePeer]:
    """One that answers, gone after the test."""
    fake = FakePeer()
    yield fake
    fake.stop()
