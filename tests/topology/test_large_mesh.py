"""Large meshes: the same plan every time, rings that get no worse, and replans that look around what is left."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from meshes import assert_sound

from benchmarks.planner import mesh, model
from topology import Constraints, Snapshot, partition
from topology.around import LARGE, NEAR, around
from topology.ring import ring_s, rings


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    return mesh(24, 4, 1)


@pytest.mark.parametrize("needs", [1, 4])
def test_a_large_mesh_is_planned_soundly_and_the_same_in_any_order(snapshot: Snapshot, needs: int) -> None:
    asked = Constraints(objective="latency", context=2048)
    spec = model(snapshot, needs)
    plan = partition(snapshot, spec, asked)
    assert_sound(plan, snapshot)
    sites, links = list(snapshot.sites), list(snapshot.links)
    random.Random(0).shuffle(sites)
    random.Random(1).shuffle(links)
    assert partition(Snapshot(tuple(sites), tuple(links)), spec, asked) == plan


def test_a_loss_is_made_good_near_what_is_left_and_keeps_it(snapshot: Snapshot) -> None:
    spec = model(snapshot, 4)
    asked = Constraints(objective="latency", context=2048)
    plan = partition(snapshot, spec, asked)
    left = snapshot.without({plan.ring[0]})
    narrow = around(left, plan)
    assert narrow is not None
    stay = set(plan.sites) - {plan.ring[0]}
    assert stay <= {site.name for site in narrow.sites} and len(narrow.sites) <= len(stay) + NEAR + 1
    again = partition(left, spec, asked, previous=plan)
    assert_sound(again, left)
    assert any("planned again among" in line for line in again.why)
    assert stay & set(again.sites)


def test_a_loss_that_nothing_near_can_make_good_is_made_good_from_afar(snapshot: Snapshot) -> None:
    spec = model(snapshot, 4)
    plan = partition(snapshot, spec, Constraints(objective="latency", context=2048))
    narrow = around(snapshot.without({plan.ring[0]}), plan)
    assert narrow is not None
    near = {site.name for site in narrow.sites}
    full = [
        replace(site, devices=tuple(replace(d, free_bytes=0) for d in site.devices)) if site.name in near else site
        for site in snapshot.sites
        if site.name != plan.ring[0]
    ]
    left = Snapshot(tuple(full), snapshot.without({plan.ring[0]}).links)
    again = partition(left, spec, Constraints(objective="latency", context=2048), previous=plan)
    assert not near & set(again.sites)


def test_small_meshes_and_first_plans_are_not_narrowed_down(snapshot: Snapshot) -> None:
    assert around(snapshot, None) is None
    plan = partition(snapshot, model(snapshot, 1), Constraints(objective="latency", context=2048))
    some = [site.name for site in snapshot.sites if site.name not in plan.sites][: len(snapshot.sites) - LARGE]
    assert around(snapshot.without(set(some)), plan) is None


def test_a_ring_of_many_stages_is_no_longer_than_by_chance_and_complete() -> None:
    rng = random.Random(3)
    cost = [[rng.uniform(1, 100) if a != b else 0.0 for b in range(30)] for a in range(30)]
    (order,) = rings(cost)
    assert sorted(order) == list(range(30)) and order[0] == 0
    chance = list(range(1, 30))
    shortest = float("inf")
    for _ in range(2000):
        rng.shuffle(chance)
        shortest = min(shortest, ring_s(cost, [0, *chance]))
    assert ring_s(cost, order) < 0.5 * shortest


def test_a_site_of_a_hundred_devices_counts_as_large_and_is_planned_in_bounded_work() -> None:
    snapshot = mesh(1, 100, 0)
    plan = partition(snapshot, model(snapshot, 1), {"objective": "latency"})
    assert plan.sites == ("s000",)
    assert_sound(plan, snapshot)
