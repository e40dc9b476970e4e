"""The rate of a link is read off the densest part of a burst, and a measurement ends in time whatever happens."""

import json
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport.measure import BURST_BYTES, CHUNK_BYTES, TRAIN_BYTES, train_rate


@given(
    rate=st.floats(1e5, 1e9),
    trains=st.lists(st.integers(1, 16), min_size=1, max_size=6),
    gap_s=st.floats(0.001, 0.5),
)
@settings(max_examples=50)
def test_the_gaps_of_slow_start_do_not_count_where_a_train_is_long_enough(rate, trains, gap_s):
    arrivals, now = [], 0.0
    for train in trains:
        now += gap_s
        for _ in range(train):
            now += CHUNK_BYTES / rate
            arrivals.append((now, CHUNK_BYTES))
    size, seconds = train_rate(arrivals)
    if max(trains) * CHUNK_BYTES > TRAIN_BYTES:
        assert size / seconds == pytest.approx(rate, rel=0.01)
    elif len(arrivals) > 1:
        assert 0 < size / seconds <= rate * 1.01


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 1 << 20)), max_size=40))
@settings(max_examples=50)
def test_any_arrivals_give_a_rate_or_nothing(steps):
    now, arrivals = 0.0, []
    for gap_s, size in steps:
        now += gap_s
        arrivals.append((now, size))
    size, seconds = train_rate(arrivals)
    assert 0 <= size <= sum(each for _, each in arrivals)
    assert 0 <= seconds <= now


def order(**document):
    process = subprocess.Popen(
        [sys.executable, "-m", "transport.measure"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process.stdin.write(json.dumps(document) + "\n")
    process.stdin.flush()
    return process


def test_two_processes_measure_what_lies_between_them():
    key = "07" * 32
    with order(answer=["tcp"], host="127.0.0.1", key=key, limit_s=30) as answers:
        addresses = json.loads(answers.stdout.readline())["addresses"]
        with order(addresses=addresses, key=key, limit_s=30) as measures:
            found = json.loads(measures.stdout.readline())["tcp"]
        assert 0 < found["rtt_s"] < 1
        assert TRAIN_BYTES <= found["bytes"] <= BURST_BYTES
        assert found["seconds"] > 0
        assert answers.wait(30) == 0


def test_nobody_who_answers_is_an_end_in_time():
    began = time.monotonic()
    with order(answer=["tcp"], host="127.0.0.1", key="07" * 32, limit_s=30) as silent:
        addresses = json.loads(silent.stdout.readline())["addresses"]
        silent.send_signal(19)  # SIGSTOP: its kernel still takes the connection
        with order(addresses=addresses, key="07" * 32, limit_s=0.5) as measures:
            assert json.loads(measures.stdout.readline()) == {}
        silent.kill()
    assert time.monotonic() - began < 30


def test_a_process_whose_parent_is_gone_ends():
    with order(answer=["tcp"], host="127.0.0.1", key="07" * 32, limit_s=60) as orphan:
        assert orphan.stdout.readline()
        orphan.stdin.close()
        assert orphan.wait(10) == 0
