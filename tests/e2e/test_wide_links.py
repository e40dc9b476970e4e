"""What real daemons find out about the links between them."""

import time

from drills import converged, site


def test_the_bandwidth_of_a_link_is_measured_by_a_burst_and_told_to_everybody():
    with converged([site("a"), site("b")]) as (_, client):
        deadline = time.monotonic() + 90
        while True:
            links = {(link.source, link.target): link for link in client.topology().links}
            if all(link.bandwidth_measured for link in links.values()):
                break
            assert time.monotonic() < deadline, links
            time.sleep(0.5)
        assert links.keys() == {("a", "b"), ("b", "a")}
        assert all(link.bandwidth > 1e6 and 0 <= link.age_s < 60 for link in links.values())
