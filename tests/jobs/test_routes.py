"""What a ring is told of its links."""

from mesh.jobs.routes import bytes_per_s
from topology.snapshot import Link, Snapshot


def both(one, other, bandwidth, via=""):
    return [Link(a, b, 0.01, bandwidth=bandwidth, via=via) for a, b in ((one, other), (other, one))]


def test_a_way_carries_what_its_narrowest_link_does_and_what_is_not_known_counts_as_nothing():
    snapshot = Snapshot((), (*both("a", "b", 5e6, via="c"), *both("a", "c", 9e6), *both("b", "c", 7e6)))
    assert bytes_per_s(snapshot, "a", "c") == 9e6
    assert bytes_per_s(snapshot, "a", "b") == bytes_per_s(snapshot, "b", "a") == 7e6
    assert bytes_per_s(snapshot, "a", "a") == bytes_per_s(snapshot, "a", "z") == 0.0
