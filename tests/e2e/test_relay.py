"""Two sites that cannot exchange anything serve a job together, through a third."""

import time

import pytest
from drills import CONVERGE_TIMEOUT_S, device, running

import mesh
from simulations.processes import Fleet, SiteSpec
from simulations.reference import reference_tokens

APART = frozenset(("a", "b"))
RTTS_MS = {frozenset(("a", "c")): 10.0, frozenset(("b", "c")): 20.0}


def links_of(client):
    return {(link.source, link.target): link for link in client.topology().links}


def until(look, timeout_s):
    deadline = time.monotonic() + timeout_s
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.3)


@pytest.fixture(scope="module")
def relayed():
    """Sites a and b that do not reach each other, and c between them."""
    fleet = Fleet([SiteSpec(name, device()) for name in "abc"], rtts_ms=RTTS_MS, cut=[APART])
    with fleet, mesh.Mesh(fleet.address("a")) as client:

        def complete():
            try:
                members = client.status()["members"]
                return len(links_of(client)) == 6 and {row["state"] for row in members} == {"alive"}
            except mesh.MeshError:
                return False  # it is not up yet

        until(complete, CONVERGE_TIMEOUT_S)
        yield fleet, client


def test_a_pair_that_is_cut_off_is_shown_through_the_third(relayed):
    _, client = relayed

    def relayed_links():
        found = links_of(client)
        return found if found["a", "b"].via and not found["a", "b"].reachable else None

    links = until(relayed_links, CONVERGE_TIMEOUT_S)
    assert links["a", "b"].via == links["b", "a"].via == "c"
    assert {links[pair].via for pair in (("a", "c"), ("b", "c"), ("c", "a"), ("c", "b"))} == {""}


def test_a_job_runs_over_both_with_the_right_tokens(relayed, tiny):
    fleet, client = relayed
    until(lambda: links_of(client)["a", "b"].via, CONVERGE_TIMEOUT_S)
    until(lambda: "b is reached through c" in fleet.log("a"), CONVERGE_TIMEOUT_S)
    request = {"prompt": "Once upon a time", "max_tokens": 12, "ignore_eos": True}
    constraints = {"sites": ["a", "b"], "stages": 2, "context": 64}
    with running(client, str(tiny), constraints) as job:
        assert set(job.plan.sites) == {"a", "b"}
        tokens = job.generate(request["prompt"], max_tokens=12, ignore_eos=True).token_ids
    assert list(tokens) == list(reference_tokens(str(tiny), [request])[0])
