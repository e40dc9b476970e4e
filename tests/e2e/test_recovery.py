"""A site dies in mid-stream, and the caller cannot tell from the tokens: none is lost, none comes twice."""

import os
import signal
import time

import psutil
import pytest
from drills import CONVERGE_TIMEOUT_S, PROMPTS, TOKENS, converged, needs, running, site

import mesh
from simulations.processes import wait_converged

SITES = ("here", "there", "yonder")
#: Emulated round trips in milliseconds.
DISTANCES = {
    frozenset(("here", "there")): 10.0,
    frozenset(("here", "yonder")): 20.0,
    frozenset(("there", "yonder")): 15.0,
}
#: A job needs all three at first, and two suffice once what is kept in reserve may be used.
MEMORY = "400MiB"
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 7}

#: What a loss looks like differs between the backends; what follows from it does not.
on_both = pytest.mark.parametrize("mesh_of_three", ["tcp", "ucx"], indirect=True, scope="module")
on_one = pytest.mark.parametrize("mesh_of_three", ["tcp"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def mesh_of_three(request):
    needs(request.param)
    sites = [site(name, memory=MEMORY) for name in SITES]
    with converged(sites, rtts_ms=DISTANCES, transport=request.param) as (fleet, client):
        yield fleet, client


@pytest.fixture
def whole(mesh_of_three):
    """The three sites, all of them up, whatever the test before did to them."""
    fleet, client = mesh_of_three
    for name in SITES:
        if not fleet.alive(name):
            fleet.start(name)
    wait_converged(fleet, SITES[0], CONVERGE_TIMEOUT_S)
    return fleet, client


def stream_through(job, prompt, after, act, **options):
    """The generation of `prompt`, with `act` called once `after` tokens have come. Each token is a chunk's."""
    acted = False
    with job.stream(prompt, max_tokens=TOKENS, ignore_eos=True, idle_timeout_s=90.0, **options) as stream:
        for _ in stream:
            if not acted and len(stream.generation.token_ids) >= after:
                acted = True
                act()
        assert acted
        return stream.generation


@on_both
@pytest.mark.parametrize("place", ["middle", "last"])
def test_a_killed_site_costs_no_token(whole, model, expected, place):
    fleet, client = whole
    with running(client, model, {"context": 2048}) as job:
        plan = job.plan
        assert set(plan.sites) == set(SITES)
        others = [name for name in plan.ring if name != SITES[0]]
        victim = others[0] if place == "middle" else others[-1]
        result = stream_through(job, PROMPTS[3], 12, lambda: fleet.kill(victim))
        assert result.token_ids == expected[3]
        after = job.refresh()
        assert victim not in after.plan.sites
        assert after.epoch > 1
        # The job goes on serving on what is left.
        assert job.generate(PROMPTS[0], max_tokens=16, ignore_eos=True).token_ids == expected[0][:16]


@on_one
def test_a_sampled_stream_goes_on_with_the_draws_it_would_have_had(whole, model):
    fleet, client = whole
    with running(client, model, {"context": 2048}) as job:
        undisturbed = job.generate(PROMPTS[1], max_tokens=TOKENS, ignore_eos=True, **SAMPLED)
        victim = next(name for name in reversed(job.plan.ring) if name != SITES[0])
        result = stream_through(job, PROMPTS[1], 20, lambda: fleet.kill(victim), **SAMPLED)
        assert result.token_ids == undisturbed.token_ids
        assert result.text == undisturbed.text


@on_both
def test_a_killed_worker_costs_no_token_and_no_site(whole, model, expected):
    fleet, client = whole
    with running(client, model, {"context": 2048}) as job:
        victim = next(name for name in job.plan.ring if name != SITES[0])

        def kill_worker():
            (worker, *_) = workers(fleet.pid(victim))
            os.kill(worker.pid, signal.SIGKILL)

        result = stream_through(job, PROMPTS[2], 12, kill_worker)
        assert result.token_ids == expected[2]
        assert fleet.alive(victim)


@on_one
def test_a_site_that_comes_back_is_planned_on_again(whole, model, expected):
    fleet, client = whole
    fleet.kill("yonder")
    with pytest.raises(mesh.PlanError):
        wait_gone(client, "yonder")
        client.plan(model, constraints={"dtype": "float32", "context": 2048, "sites": ["yonder"]})
    fleet.start("yonder")
    wait_converged(fleet, SITES[0], CONVERGE_TIMEOUT_S)
    assert "yonder" in client.plan(model, constraints={"dtype": "float32", "shards": [1, 1, 1]}).sites


@on_one
def test_no_worker_outlives_its_daemon(whole, model):
    fleet, client = whole
    with running(client, model, {"context": 2048}) as job:
        victim = next(name for name in reversed(job.plan.ring) if name != SITES[0])
        orphans = workers(fleet.pid(victim))
        assert orphans
        os.kill(fleet.pid(victim), signal.SIGKILL)
        gone, alive = psutil.wait_procs(orphans, timeout=5.0)
        assert not alive
        assert len(gone) == len(orphans)


def workers(pid):
    """The worker processes below a daemon."""
    below = psutil.Process(pid).children(recursive=True)
    return [process for process in below if any("mesh.runtime.worker" in part for part in process.cmdline())]


def wait_gone(client, name, timeout_s=30.0):
    """Until gossip holds the site for dead."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not any(
            member["site"] == name and member["state"] in ("alive", "suspect") for member in client.status()["members"]
        ):
            return
        time.sleep(0.1)
    raise AssertionError(f"{name} was not missed within {timeout_s:g} s")
