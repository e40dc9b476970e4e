"""`python -m benchmarks.gossip`: its figures, its command line, and that a seed is a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks.gossip.__main__ import main
from benchmarks.gossip.scenario import Settings, _Run
from benchmarks.gossip.watch import Change, Report, Watch, first_reports, percentile, spread
from mesh.gossip.core import Event
from mesh.gossip.profiles import PROFILES
from simulations.faults import Struck, parse_fault
from simulations.latency import uniform

CSV = "site,Oregon,New York,C\nOregon,0,60,100\nNew York,62,0,\nC,100,40,0\n"


@pytest.fixture
def rtt(tmp_path):
    place = tmp_path / "rtt.csv"
    place.write_text(CSV)
    return str(place)


def figures(capsys, *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_crash_among_three_is_detected_by_both_others_and_nobody_else_is_accused(capsys, rtt):
    found = figures(capsys, "--sites", "3", "--minutes", "0.5", "--rtt", rtt, "--fault", "crash:1")
    assert 0 < found["detect_s"]["p50"] <= found["detect_s"]["p99"] <= found["detect_s"]["max"] < 6
    assert (found["false_positives"], found["undetected"], found["rejoin_s"]) == (0, 0, None)
    assert 0 < found["converge_s"]["p50"] <= found["converge_s"]["p99"] < 1
    assert 0 < found["bytes_per_site_s"]["mean"] <= found["bytes_per_site_s"]["max"] < 2000
    assert found["events_by_kind"]["dead"] == 2
    assert found["events"] == sum(found["events_by_kind"].values())
    assert set(found["coordinate_error"]) == {"median", "p90"}
    assert (found["sites"], found["profile"], found["fault"], found["rtt"]) == (3, "isthmus", "crash:1", rtt)


def test_without_a_fault_nothing_is_detected(capsys):
    found = figures(capsys, "--sites", "3", "--minutes", "0.2")
    assert found["detect_s"] == {"p50": None, "p99": None, "max": None}
    assert found["events"] == found["false_positives"] == 0
    assert found["rtt"] is None


def test_halves_of_a_partition_report_each_other_and_meet_again(capsys):
    found = figures(capsys, "--sites", "4", "--minutes", "0.2", "--fault", "partition:20")
    assert found["detect_s"]["max"] < 20
    assert 0 < found["rejoin_s"] < 30
    assert found["false_positives"] == found["undetected"] == 0
    assert found["events_by_kind"]["dead"] == 8


@pytest.mark.parametrize("fault", ["slow:1:1", "loss:1:0.8", "flap-ingress:1:2:2", "oneway:1"])
def test_under_a_lasting_fault_a_crash_of_a_healthy_site_is_timed(capsys, fault):
    found = figures(capsys, "--sites", "5", "--minutes", "0.5", "--fault", fault)
    assert found["detect_s"]["p50"] is not None


@pytest.mark.parametrize(
    "fault", ["crash:2", "slow:2:1", "loss:3:0.8", "flap-ingress:1:2:2", "oneway:3", "partition:5"]
)
def test_the_spreading_of_changes_is_timed_whoever_suffers_later(capsys, fault):
    found = figures(capsys, "--sites", "3", "--minutes", "0.2", "--fault", fault)
    assert 0 < found["converge_s"]["p50"] <= found["converge_s"]["p99"] < 1
    assert found["unconverged"] == 0


def test_two_that_nobody_can_connect_may_give_each_other_up(capsys):
    # After the crash half way there is nobody left between the two ends of the path that works one way.
    found = figures(capsys, "--sites", "2", "--minutes", "0.5", "--fault", "oneway:1")
    assert found["events_by_kind"]["dead"] >= 1
    assert found["false_positives"] == 0


@pytest.mark.parametrize(
    ("pairs", "wrong"),
    [
        ([("a", "b"), ("a", "c"), ("b", "c")], False),  # nothing comes back to a
        ([("a", "b"), ("b", "c"), ("c", "a")], True),  # the other way round everybody is reached
        ([("a", "b")], True),
    ],
)
def test_a_report_is_wrong_if_there_is_any_way_there_and_back(pairs, wrong):
    run = _Run(Settings(uniform(3, 10.0).sites(3, 1), 1.0, 1, PROFILES["isthmus"], parse_fault("none")))
    run._sites = ("a", "b", "c")
    run._at.struck = Struck(pairs=tuple(pairs))
    run._at.fault_s, run._at.crash_s = 5.0, 50.0
    assert run._is_wrong(Report(6.0, "a", "b")) is wrong
    assert run._is_wrong(Report(4.0, "a", "b"))


def test_profiles_differ_in_nothing_but_the_algorithm(capsys):
    arguments = ("--sites", "3", "--minutes", "0.3", "--fault", "crash:1", "--jitter", "0")
    ours = figures(capsys, *arguments)
    lan = figures(capsys, *arguments, "--profile", "memberlist-lan")
    assert ours["detect_s"]["p50"] < lan["detect_s"]["p50"] < 8
    assert ours["trace_sha256"] != lan["trace_sha256"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--fault", "fire:1"], "unknown fault 'fire'"),
        (["--sites", "3", "--fault", "crash:4"], "K is 4"),
        (["--rtt", "nothere.csv"], "nothere.csv"),
        (["--profile", "serf"], "--profile"),
        (["--sites", "many"], "--sites"),
        (["--sites", "0"], "--sites"),
        (["--minutes", "-1"], "--minutes"),
        (["--minutes", "nan"], "--minutes"),
        (["--loss", "2"], "--loss"),
        (["--speed=9"], "--speed"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, says):
    assert main([*arguments, "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert says in printed.err
    assert printed.err.count("\n") == 1


def test_the_place_of_a_mistake_in_a_file_is_named(capsys, tmp_path):
    (tmp_path / "bad.csv").write_text("x,A,B\nA,0,-5\nB,1,0\n")
    assert main(["--rtt", str(tmp_path / "bad.csv")]) == 2
    assert "bad.csv, line 2, column 'B'" in capsys.readouterr().err


def test_a_seed_is_the_same_run_in_another_process(rtt):
    command = [
        sys.executable,
        "-m",
        "benchmarks.gossip",
        "--minutes",
        "0.2",
        "--rtt",
        rtt,
        "--fault",
        "crash:1",
        "--json",
    ]

    def run(hash_seed: str, seed: str) -> dict:
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([*command, "--seed", seed], env=environment, capture_output=True, timeout=60, check=True)
        return json.loads(done.stdout)

    first = run("random", "7")
    assert first == run("12345", "7")
    assert first["trace_sha256"] != run("0", "8")["trace_sha256"]
    assert len(first["trace_sha256"]) == 64


def test_percentiles_are_nearest_ranks_and_null_where_too_many_are_missing():
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(number) for number in range(1, 101)], 0.99) == 99.0
    assert percentile([1.0], 0.99) == 1.0
    assert percentile([], 0.5) is None
    assert percentile([1.0, 2.0, 3.0], 0.5, missing=1) == 2.0
    assert percentile([1.0, 2.0, 3.0], 1.0, missing=1) is None


def test_detection_counts_first_reports_after_the_crash():
    reports = [Report(1.0, "a", "x"), Report(12.0, "a", "x"), Report(13.0, "a", "x"), Report(12.5, "b", "y")]
    assert first_reports(reports, [("a", "x"), ("b", "x")], 10.0) == ([2.0], 1)


def test_convergence_counts_healthy_observers_of_healthy_owners():
    changes = [Change("a", 5.0, {"b": 0.1, "c": 0.2}), Change("b", 6.0, {"a": 0.3})]
    assert spread(changes, ["a", "b"]) == ([0.1, 0.3], 0)
    assert spread(changes, ["a", "b", "c"]) == ([0.1, 0.2, 0.3], 1)


def test_a_watch_knows_how_many_see_each_other():
    watch = Watch(["a", "b"], "load")
    watch.event(1.0, "a", Event("joined", "b"))
    watch.event(1.0, "b", Event("joined", "a"))
    assert watch.alive_pairs() == 2
    watch.event(2.0, "a", Event("suspect", "b"))
    assert watch.alive_pairs() == 1
    watch.event(3.0, "a", Event("dead", "b"))
    assert watch.sees_gone("a", "b")
    assert not watch.sees_gone("b", "a")
    assert watch.deaths == [(3.0, "a", "b")]
    assert watch.member_events == 4


def test_a_watch_times_each_change_once_per_observer():
    watch = Watch(["a", "b", "c"], "load")
    watch.event(0.5, "b", Event("updated", "a", "load"))
    watch.changed("a", 1.0)
    for when_s, observer, key in [(1.0, "a", "load"), (1.5, "b", "load"), (1.7, "b", "load"), (2.0, "c", "links")]:
        watch.event(when_s, observer, Event("updated", "a", key))
    assert watch.changes[0].seen_s == {"b": 0.5}
