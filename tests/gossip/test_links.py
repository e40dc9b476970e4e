"""What a site tells of its links: worth telling, bounded, believed only where it can be."""

from itertools import pairwise

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mesh.gossip.links import (
    BANDWIDTH_AGE_S,
    BUDGET_BYTES_S,
    BURST_BYTES,
    DEBT,
    MAX_AGE_S,
    MAX_BANDWIDTH,
    MAX_RTT_S,
    NEAREST,
    PROBE_GAP_S,
    SAMPLE,
    WHOLE_MATRIX,
    LinkReport,
    Links,
    Pace,
    choose,
    read,
)
from mesh.gossip.rtt import Rtt

FAR = 1e6  # seconds in which every purse fills


def report(min_s=0.1, median_s=0.1, jitter_s=0.001, loss=0.0, out=True, into=True, bandwidth=None):
    return LinkReport(min_s, median_s, jitter_s, loss, out, into, bandwidth)


def test_a_link_is_published_again_only_when_it_moved():
    links = Links("me")
    assert links.changed({}, 0.0) is None
    assert links.changed({"a": report()}, FAR) == {"a": [100_000, 100_000, 1_000, 0, True, True, None, None, None]}
    assert links.changed({"a": report(0.102, 0.11, 0.0012)}, 2 * FAR) is None
    assert links.changed({"a": report(0.12)}, 3 * FAR) is not None
    assert links.changed({"a": report(0.12, loss=0.5)}, 4 * FAR) is not None
    assert links.changed({"a": report(0.12, loss=0.5, bandwidth=1e6)}, 5 * FAR) is not None
    assert links.changed({}, 6 * FAR) == {}


def test_a_site_that_never_answered_is_not_told():
    links = Links("me")
    assert links.changed({"a": LinkReport.of(None, None, True, None)}, 0.0) is None


def test_restless_links_cost_no_more_than_their_budget():
    for sites in (2, 64, 490):
        links, spent = Links("me"), 0
        for step in range(3000):
            document = links.changed({f"s{n}": report(0.1 + step % 2) for n in range(sites - 1)}, float(step))
            spent += 0 if document is None else len(msgpack.packb(document))
        assert 0 < spent * sites <= BURST_BYTES + 3000 * BUDGET_BYTES_S


def test_a_path_that_breaks_is_told_though_the_purse_is_empty():
    links, many = Links("me"), {f"s{n}": report() for n in range(60)}
    for step in range(100):
        links.changed({**many, "a": report(0.1 + step % 2), "b": report()}, 0.0)
    assert links.changed({**many, "a": report(0.3), "b": report()}, 0.0) is None
    told = links.changed({**many, "a": report(0.3), "b": report(out=False)}, 0.0)
    assert told is not None
    assert read(told)["b"].cut


def test_all_links_are_told_up_to_the_whole_matrix_and_a_bounded_choice_above():
    few = {f"s{n}": report(0.1 + n / 1000) for n in range(WHOLE_MATRIX - 1)}
    assert Links("me").changed(few, 0.0).keys() == few.keys()
    many = {f"s{n}": report(0.1 + n / 1000) for n in range(489)}
    links = Links("me")
    document = links.changed(many, 0.0) or links.changed(many, FAR)
    assert len(document) == NEAREST + SAMPLE
    assert {f"s{n}" for n in range(NEAREST)} <= document.keys()
    assert len(msgpack.packb(document)) < 900


def test_both_ends_draw_the_same_sample_so_that_many_pairs_have_two_words():
    sites = [f"s{n}" for n in range(200)]
    chosen = {
        site: set(choose(site, {other: report(1.0) for other in sites if other != site}))
        - set(sorted(set(sites) - {site})[:NEAREST])
        for site in sites
    }
    mutual = sum(site in chosen[other] for site in sites for other in chosen[site])
    assert mutual > 0.4 * sum(map(len, chosen.values()))


def test_broken_paths_are_told_also_above_the_whole_matrix():
    many = {f"s{n}": report(0.1 + n / 1000) for n in range(489)}
    many["s400"] = report(0.5, into=False)
    assert "s400" in choose("me", many)


def test_what_is_told_is_read_back():
    said = {"a": report(0.1, 0.2, 0.01, 0.25, False, True, 1e6), "b": LinkReport(out=False, into=None)}
    assert read({site: each.row() for site, each in said.items()}) == said


json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=20,
)


@given(json | st.dictionaries(st.text(max_size=3), st.lists(json, min_size=9, max_size=9), max_size=3))
def test_whatever_is_published_is_within_bounds_when_read(document):
    for said in read(document).values():
        assert said.min_s is None or 0 <= said.min_s <= MAX_RTT_S
        assert said.median_s is None or 0 <= said.median_s <= MAX_RTT_S
        assert 0 <= said.jitter_s <= MAX_RTT_S
        assert 0 <= said.loss <= 1
        assert said.bandwidth is None or 0 < said.bandwidth <= MAX_BANDWIDTH
        assert said.age_s is None or 0 <= said.age_s <= MAX_AGE_S
        assert said.transport in (None, "tcp", "ucx")


def test_bandwidth_is_the_median_of_real_transfers():
    links = Links("me")
    assert links.bandwidth("a") is None
    for rate in (1e6, 1e9, 2e6):
        links.transferred("a", 1 << 20, (1 << 20) / rate, 0.0)
    assert links.bandwidth("a") == pytest.approx(2e6)


@pytest.mark.parametrize(("size", "seconds"), [(1000, 1.0), (1 << 20, 0.0), (1 << 20, -1.0), (1 << 20, float("nan"))])
def test_transfers_that_tell_nothing_are_ignored(size, seconds):
    links = Links("me")
    links.transferred("a", size, seconds, 0.0)
    assert links.bandwidth("a") is None


def test_bandwidth_is_probed_rarely_and_where_nothing_was_sent():
    links = Links("me")
    links.changed({"a": report(), "b": report(), "c": report(out=False)}, 0.0)
    links.transferred("a", 1 << 20, 1.0, 0.0)
    assert links.to_probe(0.0) == "b"
    assert links.to_probe(1.0) is None
    links.transferred("b", 1 << 20, 1.0, 1.0)
    assert links.to_probe(PROBE_GAP_S + 2.0) is None
    assert links.to_probe(BANDWIDTH_AGE_S + 2.0) == "a"


@given(st.integers(1, 63), st.lists(st.booleans(), min_size=200, max_size=200))
@settings(max_examples=30)
@example(61, [False] * 200)  # those that fail must not stand before those that nobody tried
def test_probes_of_a_mesh_cost_no_more_than_their_budget_and_one_that_fails_is_left_alone(sites, works):
    links, probes = Links("me"), []
    links.changed({f"s{n:02}": report() for n in range(sites)}, 0.0)
    hours = 2 * round(BANDWIDTH_AGE_S)
    for now in range(0, hours, 60):
        site = links.to_probe(float(now))
        if site is not None:
            probes.append((now, site))
            if works[len(probes) % len(works)]:
                links.transferred(site, 1 << 20, 1.0, float(now))
            else:
                links.probe_failed(site, float(now))
    assert {site for _, site in probes} == {f"s{n:02}" for n in range(sites)}
    assert len(probes) <= sites + 16 * sites + hours / PROBE_GAP_S
    for site in {site for _, site in probes}:
        times = [now for now, at in probes if at == site]
        assert all(later - earlier >= PROBE_GAP_S for earlier, later in pairwise(times))


def test_a_transport_that_proved_best_is_told():
    links = Links("me")
    links.changed({"a": report()}, 0.0)
    links.chose("a", "ucx")
    assert links.bandwidth("a") is None
    told = links.changed({"a": report()._replace(transport=links.transport("a"), age_s=3.4)}, FAR)
    assert (read(told)["a"].transport, read(told)["a"].age_s) == ("ucx", 3.0)


def test_a_measurement_without_an_answer_has_no_round_trip():
    assert LinkReport.of(None, False, True, None).cut
    assert LinkReport.of(Rtt(0.1, 0.2, 0.01, 3, 0.5), True, True, None).min_s == 0.1


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 5000), st.booleans()), max_size=50))
def test_a_purse_never_gives_more_than_it_earned_and_a_bounded_debt(script):
    pace, now, paid, largest = Pace(100.0, "me"), 0.0, 0.0, 0
    for wait_s, size, urgent in script:
        now += wait_s
        largest = max(largest, size)
        if pace.pay(size, 400, now, urgent=urgent):
            paid += size
        assert paid <= 0.25 * now + max(largest, BURST_BYTES / 400) + DEBT * largest


def test_a_large_mesh_that_starts_together_does_not_publish_together():
    for size in (100, 1000):
        paces = [Pace(500.0, f"s{n}") for n in range(490)]
        first_s = [next(now for now in range(1000) if pace.pay(size, 490, float(now))) for pace in paces]
        assert all(sum(now // 100 == tenth for now in first_s) < 490 / 5 for tenth in range(10))
        assert max(first_s) <= 740
        assert not any(pace.pay(size, 490, now + size * 0.9) for pace, now in zip(paces, first_s, strict=True))


def test_a_newcomer_to_a_large_mesh_publishes_at_once():
    pace = Pace(500.0, "new")
    assert next(now for now in range(1000) if pace.pay(1000, 490, float(now), fellows=1)) <= 2
