"""Random faults leave nothing hanging, nothing open and nothing wrong behind. The long run is a benchmark's."""

from __future__ import annotations

import pytest
from transport_harness import BACKENDS

from benchmarks.transport.faults import run


@pytest.mark.parametrize("name", BACKENDS)
def test_random_faults_end_in_time_and_deliver_nothing_wrong(name):
    found = run(name, 25, seed=1)
    assert found["wrong"] == []
    assert sum(found["outcomes"].values()) == 25
