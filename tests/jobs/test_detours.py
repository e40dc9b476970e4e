"""A running job takes the better way between two sites once it has been better for a while, and loses no token."""

import pytest
import trio
from test_coordinator import expected, request, running, tokens_of

from mesh.errors import PeerUnreachable, RequestError
from mesh.jobs.detours import BARRED_S, BUSY_S, LOOK_S, REST_S, STEADY_S, Detours
from mesh.jobs.routes import Way
from topology.relays import RELAY_COST_S
from topology.snapshot import Link, Snapshot

APART = frozenset(("a", "b"))
#: What the mesh needs to be sure, and the looks at either end of it.
SURE_S = STEADY_S + 2 * LOOK_S


def snapshot(via="", direct_s=0.1, leg_s=0.02, reachable=True):
    """Sites a, b and c; the first two directly at `direct_s`, each `leg_s` away from c."""
    links = []
    for one, other in (("a", "b"), ("a", "c"), ("b", "c")):
        between = (one, other) == ("a", "b")
        for source, target in ((one, other), (other, one)):
            links.append(
                Link(
                    source,
                    target,
                    direct_s if between else leg_s,
                    via=via if between else "",
                    reachable=reachable or not between,
                )
            )
    return Snapshot((), tuple(links))


def relayed(via="c"):
    found = Detours()
    found.begin([Way("a", "b", {}, {}, via), Way("b", "a", {}, {}, via)])
    return found


def looks(detours, shown, start_s, until_s):
    """Every look from one time to another; the moves."""
    times = [start_s + i * LOOK_S for i in range(int((until_s - start_s) / LOOK_S) + 1)]
    return [(now, move) for now in times if (move := detours.look(shown, now))]


def test_a_way_that_is_as_it_was_is_left_alone():
    assert looks(relayed(), snapshot(via="c"), 0, 1000) == []


def test_another_way_is_taken_once_it_has_been_better_for_a_while():
    first, move = looks(relayed(), snapshot(), 0, 100)[0]
    assert first == STEADY_S
    assert str(move) == "a - b directly"
    assert move.may_wait


def test_one_that_changes_from_look_to_look_is_not():
    detours = relayed()
    for now in range(0, 1000, 4):
        assert detours.look(snapshot(), now) is None
        assert detours.look(snapshot(via="c"), now + 2) is None


def test_a_third_that_takes_the_place_of_the_second_has_to_prove_itself_anew():
    detours = relayed()
    assert looks(detours, snapshot(via="d"), 0, STEADY_S - LOOK_S) == []
    first, move = looks(detours, snapshot(), STEADY_S, 100)[0]
    assert first == 2 * STEADY_S
    assert move.pairs["a", "b"].via == ""


def test_a_busy_job_is_moved_after_a_bounded_wait():
    waits = {now: move.may_wait for now, move in looks(relayed(), snapshot(), 0, 200)}
    assert waits[STEADY_S + BUSY_S - LOOK_S]
    assert not waits[STEADY_S + BUSY_S]


def test_where_most_of_the_round_trip_is_saved_a_busy_job_does_not_wait():
    first, move = looks(relayed(), snapshot(direct_s=0.015), 0, 100)[0]
    assert first == STEADY_S
    assert not move.may_wait
    assert 2 * 0.02 + RELAY_COST_S - 0.015 > 0.02


def test_a_way_in_use_that_is_said_to_be_cut_is_no_haste_while_it_carries_tokens():
    first, move = looks(relayed(""), snapshot(via="c", reachable=False), 0, 100)[0]
    assert first == STEADY_S
    assert move.may_wait
    assert str(move) == "a - b through c"


def test_a_way_that_proved_to_be_none_is_let_be():
    detours = relayed()
    now, move = looks(detours, snapshot(), 0, 100)[0]
    detours.failed(move, now)
    assert detours.kept(now + 1) == {("a", "b"): "c"}
    detours.begin([Way("a", "b", {}, {}, "c")])
    assert looks(detours, snapshot(), now, now + BARRED_S - LOOK_S) == []
    assert looks(detours, snapshot(), now + BARRED_S, now + BARRED_S + SURE_S)
    assert detours.kept(now + BARRED_S) == {}


def test_after_a_move_that_requests_waited_for_the_next_waits_for_an_idle_moment():
    detours = relayed()
    detours.moved(0.0, busy=True)
    waits = {now: move.may_wait for now, move in looks(detours, snapshot(direct_s=0.015), 0, 2 * REST_S)}
    assert waits[REST_S - LOOK_S]
    assert not waits[REST_S]


# ------------------------------------------------------------------------------------------------ a job


@pytest.fixture
def two():
    """Two sites of three hold the model together."""
    return {"sites": ["a", "b"], "stages": 2}


def vias(world, counter):
    """How the channels of an epoch went."""
    return {via for peer in world.peers.values() for epoch, _, via in peer.neighbours if epoch == counter}


async def through_c(world):
    world.relays[APART] = "c"
    with trio.fail_after(10):
        await world.coordinator.job.ready()


async def test_an_idle_job_turns_direct_and_keeps_its_plan(tmp_path, autojump_clock, two):
    async with running(tmp_path, constraints=two) as world:
        await through_c(world)
        plan = world.coordinator.job.plan
        assert vias(world, 1) == {"c"}
        del world.relays[APART]
        await trio.sleep(SURE_S)
        job = world.coordinator.job
        assert (job.state, job.counter, job.recoveries) == ("ready", 2, 0)
        assert vias(world, 2) == {""}
        assert job.plan.stages == plan.stages
        assert (await tokens_of(world, request(5)))[0] == expected(5)


async def test_a_busy_job_waits_for_a_moment_without_requests(tmp_path, autojump_clock, two):
    async with running(tmp_path, constraints=two) as world:
        await through_c(world)
        del world.relays[APART]
        epochs = []
        with trio.fail_after(60):
            tokens, _, _ = await tokens_of(world, request(200), lambda _: epochs.append(world.coordinator.job.counter))
        assert tokens == expected(200)
        assert set(epochs) == {1}
        await trio.sleep(0.5)
        assert world.coordinator.job.counter == 2


async def test_a_stream_that_does_not_end_is_moved_in_its_midst_without_losing_a_token(tmp_path, autojump_clock, two):
    async with running(tmp_path, constraints=two) as world:
        await through_c(world)
        world.step_s = 1.0
        del world.relays[APART]
        with trio.fail_after(200):
            tokens, _, _ = await tokens_of(world, request(150))
        assert tokens == expected(150)
        assert world.coordinator.job.counter == 2
        assert len(world.peers[world.coordinator.job.plan.stages[0].lead.site].started) == 2


async def test_a_large_gain_does_not_wait(tmp_path, autojump_clock, two):
    async with running(tmp_path, constraints=two) as world:
        world.rtts_s = {frozenset(("a", "c")): 0.05, frozenset(("b", "c")): 0.05}
        await through_c(world)
        del world.relays[APART]
        world.step_s = 1.0
        with trio.fail_after(60):
            tokens, _, _ = await tokens_of(world, request(25))
        assert tokens == expected(25)
        assert world.coordinator.job.counter == 2


async def test_a_direct_way_that_only_gossip_finds_costs_seconds_and_not_the_job(tmp_path, autojump_clock, two):
    async with running(tmp_path, constraints=two) as world:
        await through_c(world)
        del world.relays[APART]
        world.walls.add(APART)
        await trio.sleep(SURE_S + 10)
        job = world.coordinator.job
        assert (job.state, job.counter) == ("ready", 3)
        assert (vias(world, 2), vias(world, 3)) == ({""}, {"c"})
        await trio.sleep(BARRED_S / 2)
        assert job.counter == 3


async def test_a_relay_that_refuses_moves_nothing(tmp_path, autojump_clock, two):
    async with running(tmp_path, constraints=two) as world:
        await world.coordinator.job.ready()
        world.peers["c"].relay_error = RequestError("c relays for nobody")
        world.relays[APART] = "c"
        await trio.sleep(BARRED_S / 2)
        assert world.coordinator.job.counter == 1


async def test_a_site_lost_during_a_move_is_a_loss_like_any_other(tmp_path, autojump_clock):
    spare = {"sites": ["a", "b", "d"], "stages": 2}
    async with running(tmp_path, names=("a", "b", "c", "d"), constraints=spare) as world:
        world.relays = {frozenset((one, other)): "c" for one in "abd" for other in "abd" if one < other}
        await through_c(world)
        first = world.coordinator.job.plan
        victim = next(site for site in first.sites if site != "a")

        async def die(request, progress):
            world.peers[victim].kill()
            raise PeerUnreachable("nobody answers")

        world.peers[victim].prepare = die
        world.relays = {}
        await trio.sleep(30)
        job = world.coordinator.job
        assert job.state == "ready"
        assert victim not in job.plan.sites
        assert (await tokens_of(world, request(5)))[0] == expected(5)
