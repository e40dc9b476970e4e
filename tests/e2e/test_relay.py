"""Two sites that cannot exchange anything serve a job together, through a third."""

import shutil
import sys
import time

import pytest
from drills import CONVERGE_TIMEOUT_S, device, running

import mesh
from simulations.processes import Fleet, SiteSpec
from simulations.reference import reference_tokens

APART = frozenset(("a", "b"))
RTTS_MS = {frozenset(("a", "c")): 10.0, frozenset(("b", "c")): 20.0}
REQUEST = {"prompt": "Once upon a time", "max_tokens": 12, "ignore_eos": True}
#: `mesh up` whose cut ends when a file appears.
HEALING = """
import os, sys
from mesh.cli import main
from mesh.peer import config

class Cut(tuple):
    def __contains__(self, address):
        return not os.path.exists({healed!r}) and super().__contains__(address)

load = config.load
config.load = lambda *args, **kwargs: (found := load(*args, **kwargs)).model_copy(update={{"cut": Cut(found.cut)}})
sys.exit(main())
"""


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
def healed(tmp_path_factory):
    """Once this file is there, the sites of `relayed` reach each other."""
    return tmp_path_factory.mktemp("cut") / "healed"


@pytest.fixture(scope="module")
def relayed(healed):
    """Sites a and b that do not reach each other, and c between them."""
    command = (sys.executable, "-c", HEALING.format(healed=str(healed)))
    fleet = Fleet([SiteSpec(name, device()) for name in "abc"], rtts_ms=RTTS_MS, cut=[APART], command=command)
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


@pytest.fixture(scope="module")
def job(relayed, tiny):
    """A job on a and b, set up while they do not reach each other."""
    fleet, client = relayed
    until(lambda: links_of(client)["a", "b"].via, CONVERGE_TIMEOUT_S)
    until(lambda: "b is reached through c" in fleet.log("a"), CONVERGE_TIMEOUT_S)
    with running(client, str(tiny), {"sites": ["a", "b"], "stages": 2, "context": 2048}) as job:
        yield job


def test_a_job_runs_over_both_with_the_right_tokens(job, tiny):
    assert set(job.plan.sites) == {"a", "b"}
    tokens = job.generate(REQUEST["prompt"], max_tokens=12, ignore_eos=True).token_ids
    assert list(tokens) == list(reference_tokens(str(tiny), [REQUEST])[0])


def test_a_stream_turns_direct_in_its_midst_and_needs_the_relay_no_more(relayed, healed, job, tiny):
    fleet, client = relayed  # the last test that has use for it
    direct_from, tokens = 0, []
    before = job.refresh().epoch
    with job.stream(REQUEST["prompt"], max_tokens=2000, ignore_eos=True, idle_timeout_s=60.0) as stream:
        for _ in stream:
            tokens = stream.generation.token_ids
            if len(tokens) == 5:
                healed.touch()
            if not direct_from and len(tokens) % 8 == 0 and job.refresh().epoch > before:
                assert links_of(client)["a", "b"].via == links_of(client)["b", "a"].via == ""
                direct_from = len(tokens)
                fleet.kill("c")
            if direct_from and len(tokens) > direct_from + 100:
                break
    after = job.refresh()
    assert (after.epoch, after.state) == (before + 1, "ready")
    assert "goes on over other ways: a - b directly" in fleet.log("a")
    assert list(tokens) == list(reference_tokens(str(tiny), [{**REQUEST, "max_tokens": len(tokens)}])[0])


def test_a_site_without_the_model_gets_it_from_one_that_it_does_not_reach(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "owner" / "tiny")
    (tmp_path / "empty").mkdir()
    empty = {"models": str(tmp_path / "empty")}
    sites = [
        SiteSpec("a", device(), settings={"models": str(tmp_path / "owner")}),
        SiteSpec("b", device(), settings=empty),
        SiteSpec("c", device(), settings=empty),
    ]
    with Fleet(sites, rtts_ms=RTTS_MS, cut=[APART]) as fleet, mesh.Mesh(fleet.address("a")) as client:
        until(lambda: "b is reached through c" in fleet.log("a"), CONVERGE_TIMEOUT_S)
        until(lambda: "a is reached through c" in fleet.log("b"), CONVERGE_TIMEOUT_S)
        with running(client, "tiny", {"sites": ["b"], "context": 64}) as job:
            assert job.plan.sites == ("b",)
        assert "weights: a is reached through c" in fleet.log("b")
        with mesh.Mesh(fleet.address("b")) as there:
            assert [row["bytes"] > 0 for row in there.status()["models"] if row["cached"]] == [True]
