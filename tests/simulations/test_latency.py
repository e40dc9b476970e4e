"""Matrices of round trips: what is read, what is refused with its place, and how sites are laid out by them."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from mesh.errors import ConfigError
from mesh.gossip.config import valid_name
from simulations.latency import NEIGHBOURS_MS, load_rtt, uniform

GOOD = "region,Canada central,B,C\nCanada central,0,10,30\nB,20,0,\nC,30,5,0\n"


def written(path, text):
    path.write_text(text)
    return path


def test_a_csv_has_names_and_round_trips_in_ms(tmp_path):
    matrix = load_rtt(written(tmp_path / "a.csv", "x,A,B\nA,0,10.5\nB,11.5,0\n"))
    assert matrix.names == ("A", "B")
    assert matrix.rtt_ms.tolist() == [[0, 10.5], [11.5, 0]]
    assert matrix.pair_ms().tolist() == [[0, 11], [11, 0]]
    assert matrix.one_way_s()[0, 1] == pytest.approx(0.00525)


def test_zero_in_a_csv_is_a_round_trip_and_in_a_raw_matrix_a_gap(tmp_path):
    named = load_rtt(written(tmp_path / "a.csv", "x,A,B\nA,0,0\nB,0,0\n"))
    assert named.rtt_ms.tolist() == [[0, 0], [0, 0]]
    raw = tmp_path / "a.tsv.gz"
    raw.write_bytes(gzip.compress(b"0\t0\t7\n0\t0\t3\n7\t3\t0\n"))
    assert load_rtt(raw).rtt_ms.tolist() == [[0, 10, 7], [10, 0, 3], [7, 3, 0]]


def test_a_gap_takes_the_other_direction_first(tmp_path):
    assert load_rtt(written(tmp_path / "a.csv", GOOD)).rtt_ms[1, 2] == 5.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x,A,B\nA,0,1\n", "must be square"),
        ("x,A,B\nA,0,1\nB,1\n", "line 3: 2 cells"),
        ("x,A,B\nA,0,-1\nB,1,0\n", "line 2, column 'B': -1 ms"),
        ("x,A,B\nA,0,1\nB,fast,0\n", "line 3, column 'A': 'fast'"),
        ("x,A,B\nA,0,inf\nB,1,0\n", "line 2, column 'B'"),
        ("x,A,B\nB,0,1\nA,1,0\n", "line 2: row of 'B'"),
        ("x,A,A\nA,0,1\nA,1,0\n", "'A' stands there twice"),
        ("", "expected a header"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(tmp_path, text, says):
    place = written(tmp_path / "bad.csv", text)
    with pytest.raises(ConfigError, match=f"bad.csv.*{says}") as raised:
        load_rtt(place)
    assert "\n" not in str(raised.value)


def test_files_that_are_missing_or_no_text_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothere"):
        load_rtt(tmp_path / "nothere.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="not a text file"):
        load_rtt(tmp_path / "b.csv")
    (tmp_path / "c.tsv.gz").write_bytes(b"no gzip")
    with pytest.raises(ConfigError, match=r"c\.tsv\.gz"):
        load_rtt(tmp_path / "c.tsv.gz")
    broken = bytearray(gzip.compress(b"0 1\n1 0\n" * 50))
    broken[10] ^= 0xFF
    (tmp_path / "e.tsv.gz").write_bytes(broken)
    with pytest.raises(ConfigError, match=r"e\.tsv\.gz: cannot be read"):
        load_rtt(tmp_path / "e.tsv.gz")
    with pytest.raises(ConfigError, match="must be square"):
        load_rtt(written(tmp_path / "d.tsv", "0\t1\n1\n"))


def test_fewer_sites_are_a_sample_drawn_by_the_seed(tmp_path):
    matrix = uniform(40, 10.0)
    first = matrix.sites(10, 1)
    assert first.names == matrix.sites(10, 1).names != matrix.sites(10, 2).names
    assert set(first.names) < set(matrix.names)
    assert np.all(np.diag(first.rtt_ms) == 0)


def test_more_sites_repeat_the_rows_close_together(tmp_path):
    sites = load_rtt(written(tmp_path / "a.csv", GOOD)).sites(7, 1)
    assert sites.names == ("Canada-central", "B", "C", "Canada-central-2", "B-2", "C-2", "Canada-central-3")
    assert len(set(sites.names)) == 7
    assert all(valid_name(name) for name in sites.names)
    assert sites.rtt_ms[0, 3] == sites.rtt_ms[6, 0] == NEIGHBOURS_MS
    assert sites.rtt_ms[3, 1] == 10.0
    assert sites.rtt_ms[3, 3] == 0.0
