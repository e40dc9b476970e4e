"""Peers come, go, stop and die in the middle of a sentence; clients and commands too. Nothing is lost, nothing stays.

All sites lie 30 ms apart, so that a stream lasts for seconds although the model is tiny. What is drawn depends on the
seed alone: every disturbed stream must say what the undisturbed one said.
"""

import contextlib
import os
import signal
import time

import psutil
import pytest
from drills import CONVERGE_TIMEOUT_S, READY_TIMEOUT_S, SPEED, converged, needs, running
from noise import make_noise, ports_of
from small import COMMAND_S, below, command, ended, eventually, group, member, python, workers

import mesh
from mesh.peer.control import THREADS
from simulations.processes import Fleet, SiteSpec, free_ports, wait_converged

SITES = ("a", "b", "c")
DISTANCES = {frozenset(pair): 30.0 for pair in (("a", "b"), ("a", "c"), ("b", "c"))}
DEVICES = (f"cpu,threads=1,memory=600MiB,{SPEED}",)
PROMPT, TOKENS, SOON = "Once upon a time", 120, 15
SAMPLED = {"temperature": 1.0, "seed": 11, "ignore_eos": True}
CONTEXT = 512
SHAPE = {"shards": [1, 1, 1], "context": CONTEXT}
NOISE_S = float(os.environ.get("ISTHMUS_NOISE_S", "6"))
#: A recovery must replace a worker, which imports torch: seconds on a busy machine.
RECOVERY_S = 90.0


class Mesh3:
    """Three sites and a job over all of them, restored before each test that needs it."""

    def __init__(self, fleet, client, model):
        self.fleet, self.client, self.model = fleet, client, model
        self.job = None

    def whole(self):
        """Every site up and seen by every other."""
        for name in SITES:
            if not self.fleet.alive(name):
                self.fleet.start(name)
        for name in SITES:
            wait_converged(self.fleet, name, CONVERGE_TIMEOUT_S)

    def ready(self):
        """A job of three stages, owned by the first site; the one of the test before where it still is one."""
        self.whole()
        if self.job is not None and (self.job.refresh().state != "ready" or len(self.job.plan.sites) < len(SITES)):
            self.job.cancel()
            self.job = None
        if self.job is None:
            self.job = self.submit(self.client)
        return self.job

    def submit(self, client):
        """A job over all three sites. A site that was lost a moment ago is not planned on at once."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        job = client.submit(self.model, constraints=SHAPE)
        job.wait(max(1.0, deadline - time.monotonic()))
        assert set(job.plan.sites) == set(SITES)
        return job

    def victim(self, role):
        """The site of the last stage that is not the owner's, or of the first such."""
        others = [site for site in self.job.plan.ring if site != "a"]
        return others[-1 if role == "last" else 0]


@pytest.fixture(scope="module")
def mesh3(tiny):
    sites = [SiteSpec(name, DEVICES) for name in SITES]
    with Fleet(sites, rtts_ms=DISTANCES, http=True) as fleet, mesh.Mesh(fleet.address("a")) as client:
        wait_converged(fleet, "a", CONVERGE_TIMEOUT_S)
        yield Mesh3(fleet, client, tiny)


@pytest.fixture
def job(mesh3):
    return mesh3.ready()


@pytest.fixture(scope="module")
def said(mesh3):
    """What an undisturbed stream says."""
    tokens = mesh3.ready().generate(PROMPT, max_tokens=TOKENS, **SAMPLED).token_ids
    assert len(tokens) == TOKENS
    return tokens


def through(job, act, after=SOON, tokens=TOKENS):
    """A stream with `act` called once `after` tokens have come: its tokens, and the longest gap in seconds."""
    gap_s, acted, last = 0.0, False, time.monotonic()
    with job.stream(PROMPT, max_tokens=tokens, idle_timeout_s=RECOVERY_S, **SAMPLED) as stream:
        for _ in stream:
            now = time.monotonic()
            gap_s, last = max(gap_s, now - last), now
            if not acted and len(stream.generation.token_ids) >= after:
                acted = True
                act()
        assert acted
        return stream.generation.token_ids, gap_s


def metric(fleet, site, name):
    import urllib.request

    with urllib.request.urlopen(f"http://{fleet.http_address(site)}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name) and not line.startswith("#"))


def all_workers(fleet):
    return [worker for name in fleet.sites if fleet.alive(name) for worker in workers(fleet.pid(name))]


def idle(fleet):
    """True once the workers of all sites take no more steps: their processor time stands still."""

    def spent():
        return sum(sum(worker.cpu_times()[:2]) for worker in all_workers(fleet))

    before, tokens = spent(), metric(fleet, "a", "isthmus_tokens_total")
    time.sleep(0.5)
    return metric(fleet, "a", "isthmus_tokens_total") == tokens and spent() - before < 0.2


# -- noise


def test_random_bytes_at_every_port_change_nothing(mesh3, job, said):
    noise_changes_nothing(mesh3.fleet, mesh3.client, job, said)


def test_random_bytes_at_the_ports_of_ucx_change_nothing(tiny, said):
    needs("ucx")
    sites = [SiteSpec(name, DEVICES) for name in "ab"]
    with (
        converged(sites, rtts_ms=DISTANCES, transport="ucx") as (fleet, client),
        running(client, tiny, {"shards": [1, 1], "context": CONTEXT}) as job,
    ):
        noise_changes_nothing(fleet, client, job, said)


def noise_changes_nothing(fleet, client, job, said):
    """Throw noise at all that daemons and workers listen on: the tokens, the processes and the epoch stay the same."""
    daemons = [psutil.Process(fleet.pid(name)) for name in fleet.sites]
    before = all_workers(fleet)
    assert len(before) == len(fleet.sites)
    tcp, udp = ports_of([*daemons, *before])
    assert len(tcp) >= len(daemons) + len(before)
    assert len(udp) >= len(daemons)
    job.generate(PROMPT, max_tokens=4, **SAMPLED)
    descriptors = [process.num_fds() for process in (*daemons, *before)]
    epoch = job.refresh().epoch
    with make_noise(tcp, udp, seed=5) as thrown:
        end = time.monotonic() + NOISE_S
        while True:
            assert job.generate(PROMPT, max_tokens=TOKENS, **SAMPLED).token_ids == said
            if time.monotonic() > end:
                break
    print(f"{thrown.datagrams} datagrams, {thrown.connections} connections at {len(tcp)} + {len(udp)} ports")
    assert thrown.datagrams > 100 and thrown.connections > 100
    assert job.refresh().epoch == epoch
    assert all_workers(fleet) == before
    fleet.check()
    assert [member(client, name) for name in fleet.sites] == ["alive"] * len(fleet.sites)

    def let_go():
        now = [process.num_fds() for process in (*daemons, *before)]
        return all(after <= was + 6 for was, after in zip(descriptors, now, strict=True))

    eventually(let_go, what="the closing of the connections that the noise had opened")


# -- clients


CLIENT = """
import sys, mesh
job = mesh.connect(sys.argv[1]).job(sys.argv[2])
for chunk in job.stream("Once upon a time", max_tokens=450, ignore_eos=True, temperature=1.0, seed=1):
    print(len(chunk.token_ids), flush=True)
"""


@pytest.mark.parametrize("site", ["a", "b"], ids=["of the owner", "of another peer"])
def test_the_request_of_a_client_that_vanishes_is_ended(mesh3, job, said, site):
    with python(CLIENT, mesh3.fleet.address(site), job.id) as client:
        for _ in range(SOON):
            assert client.stdout.readline()
        client.kill()
    killed_at = time.monotonic()
    eventually(lambda: idle(mesh3.fleet), 15.0, "the end of the request's steps")
    assert time.monotonic() - killed_at < 10.0
    # The room it had in the cache is free: a request that needs nearly all of it starts at once.
    with job.stream(PROMPT, max_tokens=CONTEXT, idle_timeout_s=10.0, **SAMPLED) as stream:
        for _ in stream:
            if len(stream.generation.token_ids) >= SOON:
                break
    eventually(lambda: idle(mesh3.fleet), 15.0, "the end of the request's steps")
    assert job.generate(PROMPT, max_tokens=SOON, **SAMPLED).token_ids == said[:SOON]


def test_ctrl_c_ends_a_generation_with_130_and_its_request(mesh3, job):
    arguments = ("--max-tokens", 450, "--ignore-eos", "--peer", mesh3.fleet.address("a"))
    process = command("generate", job.id, PROMPT, *arguments)
    assert process.stdout.read(8)
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert (code, err) == (130, "")
    eventually(lambda: idle(mesh3.fleet), 15.0, "the end of the request's steps")


def test_ctrl_c_ends_a_submission_with_130_and_the_job_goes_on(mesh3, job):
    job.cancel()
    eventually(lambda: not all_workers(mesh3.fleet), 15.0, "the end of the workers before")
    process = command("submit", mesh3.model, "-c", "shards=1,1,1", "--peer", mesh3.fleet.address("a"))
    eventually(lambda: all_workers(mesh3.fleet), COMMAND_S, "the first worker")
    process.send_signal(signal.SIGINT)
    code, out, err = ended(process)
    assert (code, out) == (130, "")
    (live,) = [entry for entry in mesh3.client.jobs() if entry.state not in ("failed", "cancelled")]
    assert err == f"job {live.id} goes on without this command; `mesh cancel {live.id}` ends it\n"
    mesh3.client.job(live.id).cancel()
    eventually(lambda: not all_workers(mesh3.fleet), 15.0, "the end of the workers")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_peer_that_found_nobody(tmp_path, number):
    (port,) = free_ports(1)
    process = command(
        "up", "--site", "lonely", "--listen", "127.0.0.1:0", "--join", f"127.0.0.1:{port}",
        "--data-dir", tmp_path / "data", "--device", f"cpu,threads=1,memory=100MiB,{SPEED}",
    )  # fmt: skip
    assert process.stdout.readline().startswith("lonely is up at 127.0.0.1:")
    assert f"nobody answers at 127.0.0.1:{port}" in process.stderr.readline()
    process.send_signal(number)
    code, _, _ = ended(process)
    assert code == 0


def test_ctrl_c_ends_a_peer_that_is_still_starting(tmp_path):
    # No figures are stated, so the start spends seconds in a process of its own that measures.
    where = ("--listen", "127.0.0.1:0", "--data-dir", tmp_path / "data")
    process = command("up", *where, "--device", "cpu,threads=1,memory=100MiB")
    eventually(lambda: below(process.pid), COMMAND_S, "the discovery of devices")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    code, out, err = ended(process)
    assert (code, out, err) == (0, "", "")


# -- workers


def test_a_worker_that_dies_while_loading_is_replaced(mesh3, job, said):
    job.cancel()
    eventually(lambda: not all_workers(mesh3.fleet), 15.0, "the end of the workers")
    mesh3.job = again = mesh3.client.submit(mesh3.model, constraints=SHAPE)
    victim = eventually(lambda: workers(mesh3.fleet.pid("b")), COMMAND_S, "a worker at b")[0]
    assert again.refresh().state == "loading"
    victim.kill()
    again.wait(READY_TIMEOUT_S)
    assert again.refresh().epoch > 1
    assert again.generate(PROMPT, max_tokens=SOON, **SAMPLED).token_ids == said[:SOON]
    assert len(all_workers(mesh3.fleet)) == len(again.plan.sites)


@pytest.mark.parametrize("role", ["owner", "last"])
def test_a_worker_that_dies_costs_no_token_and_no_site(mesh3, job, said, role):
    fleet = mesh3.fleet
    site = "a" if role == "owner" else mesh3.victim(role)
    (victim,) = workers(fleet.pid(site))
    tokens, _ = through(job, victim.kill)
    assert tokens == said
    assert fleet.alive(site)
    assert len(all_workers(fleet)) == len(job.plan.sites)


# -- sites


def test_callers_beyond_what_a_peer_can_serve_are_told_so(mesh3, job):
    address = mesh3.fleet.address("a")
    with contextlib.ExitStack() as held:
        clients = [held.enter_context(mesh.Mesh(address)) for _ in range(4)]
        watches = []
        with pytest.raises(mesh.MeshError, match="cannot take"):
            for number in range(4 * THREADS):
                watch = clients[number % 4].job(job.id).watch(COMMAND_S)
                watches.append(watch)
                next(watch)
        assert len(watches) > THREADS // 2
        for watch in watches:
            watch.close()
    eventually(lambda: answers(mesh3.client), what="an answer after the crowd has left")


def answers(client):
    try:
        return bool(client.status())
    except mesh.MeshError:
        return False


@pytest.mark.parametrize("role", ["last", "middle"])
def test_a_site_that_leaves_costs_no_token(mesh3, job, said, role):
    fleet, left = mesh3.fleet, []
    site = mesh3.victim(role)
    process = fleet._processes[site]
    tokens, _ = through(job, lambda: process.send_signal(signal.SIGTERM))
    left.append(process.wait(30))
    assert tokens == said
    assert left == [0]
    assert member(mesh3.client, site) == "left"
    assert site not in job.plan.sites
    assert not group(process.pid)
    assert "Traceback" not in fleet.log(site)


def test_a_site_that_stands_still_costs_no_token_and_does_no_harm_when_it_returns(mesh3, job, said):
    fleet = mesh3.fleet
    site = mesh3.victim("last")
    try:
        tokens, gap_s = through(job, lambda: fleet.pause(site))
        assert tokens == said
        print(f"the stream stood still for {gap_s:.1f} s")
        assert gap_s < 45.0
        assert site not in job.plan.sites
        epoch = job.refresh().epoch
        eventually(lambda: member(mesh3.client, site) == "dead", what="the loss of the site")
    finally:
        fleet.resume(site)
    assert job.generate(PROMPT, max_tokens=TOKENS, **SAMPLED).token_ids == said
    wait_converged(fleet, "a", CONVERGE_TIMEOUT_S)
    eventually(lambda: member(mesh3.client, site) == "alive", what="the return of the site")
    eventually(lambda: not workers(fleet.pid(site)), what="the end of the workers nobody listens to")
    assert job.generate(PROMPT, max_tokens=SOON, **SAMPLED).token_ids == said[:SOON]
    assert job.refresh().epoch == epoch
    fleet.check()


def test_an_owner_that_stands_still_loses_its_workers_and_sets_up_anew_when_it_returns(mesh3, job, said):
    fleet = mesh3.fleet
    others = [worker for name in "bc" for worker in workers(fleet.pid(name))]
    try:
        fleet.pause("a")
        stopped_at = time.monotonic()
        _, alive = psutil.wait_procs(others, timeout=60.0)
        assert not alive
        print(f"workers of an owner that stood still ended after {time.monotonic() - stopped_at:.1f} s")
    finally:
        fleet.resume("a")
    tokens = eventually(lambda: served(job), RECOVERY_S, "the job's recovery")
    assert tokens == said[:SOON]
    fleet.check()


def served(job):
    try:
        return job.generate(PROMPT, max_tokens=SOON, idle_timeout_s=RECOVERY_S, **SAMPLED).token_ids
    except mesh.PeerUnreachable:  # the connection of before the pause
        return []


def test_an_owner_that_leaves_first_finishes_what_it_serves(mesh3, said):
    mesh3.whole()
    fleet = mesh3.fleet
    if mesh3.job is not None:
        mesh3.job.cancel()
        mesh3.job = None
    with mesh.connect(fleet.address("b")) as client:
        job = mesh3.submit(client)
        process = fleet._processes["b"]

        def leave():
            process.send_signal(signal.SIGTERM)
            eventually(lambda: client.status()["state"] == "leaving", what="the peer's intention to leave")
            with pytest.raises(mesh.PeerUnreachable, match="b is leaving"):
                client.submit(mesh3.model)
            with pytest.raises(mesh.PeerUnreachable, match="b, which owns"):
                job.generate(PROMPT, max_tokens=1)

        tokens, _ = through(job, leave, after=60)
        assert tokens == said
    assert process.wait(30) == 0
    assert not group(process.pid)
    eventually(lambda: not all_workers(fleet), what="the end of the job's workers at the other sites")
    assert member(mesh3.client, "b") == "left"
    assert "Traceback" not in fleet.log("b")


def test_a_killed_owner_leaves_no_worker_and_nothing_that_blocks_its_next_start(mesh3):
    mesh3.whole()
    fleet = mesh3.fleet
    with mesh.connect(fleet.address("b")) as client:
        job = mesh3.submit(client)
        own = workers(fleet.pid("b"))
        others = [worker for worker in all_workers(fleet) if worker not in own]
        assert own and others
        with pytest.raises(mesh.PeerUnreachable, match="broke"):
            through(job, lambda: os.kill(fleet.pid("b"), signal.SIGKILL))
        killed_at = time.monotonic()
        _, alive = psutil.wait_procs(own, timeout=10.0)
        own_s = time.monotonic() - killed_at
        assert not alive
        _, alive = psutil.wait_procs(others, timeout=20.0)
        others_s = time.monotonic() - killed_at
        assert not alive
    print(f"own workers gone after {own_s:.1f} s, the others' after {others_s:.1f} s")
    assert own_s < 5.0
    assert others_s < 12.0
    fleet._processes["b"].wait(5)
    fleet.start("b")
    wait_converged(fleet, "b", CONVERGE_TIMEOUT_S)
    eventually(lambda: member(mesh3.client, "b") == "alive", what="the return of the site")
