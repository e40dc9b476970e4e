"""The clients' fake peer, and a way to run a command in this process."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "client"))

from fake_peer import FakePeer


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePeer]:
    """One that answers, and that commands find without --peer."""
    fake = FakePeer()
    monkeypatch.setenv("MESH_PEER", fake.address)
    yield fake
    fake.stop()
