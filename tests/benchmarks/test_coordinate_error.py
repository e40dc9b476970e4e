"""The coordinates' error against measured matrices, by one command and reproducibly."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.coordinates import coordinate_error, coordinates_error, main
from mesh.gossip.coordinates import DIMENSIONS, Coordinate
from simulations.latency import load_rtt

LATENCY = Path(__file__).parents[3] / "shared" / "data" / "latency"


def test_the_error_is_relative_to_what_was_measured_and_skips_the_rest():
    a = Coordinate((0.0,) * DIMENSIONS, 0.0)
    b = Coordinate((0.1,) + (0.0,) * (DIMENSIONS - 1), 0.0)
    rtt_ms = np.array([[0.0, 80.0, 0.0], [100.0, 0.0, np.nan], [0.0, 0.0, 0.0]])
    assert coordinates_error([a, b, a], rtt_ms) == pytest.approx({"median": 0.125, "p90": 0.225})


def test_the_command_prints_the_error_of_a_file_twice_the_same(tmp_path, capsys):
    file = tmp_path / "three.csv"
    file.write_text("region,a,b,c\na,0,10,20\nb,10,0,25\nc,20,25,0\n")
    found = []
    for _ in range(2):
        main(["--rtt", str(file), "--cycles", "20", "--seed", "3", "--json"])
        error = json.loads(capsys.readouterr().out)["coordinate_error"]
        found.append((error["median"], error["p90"]))
    assert found[0] == found[1]
    assert found[0][1] < 0.5


def test_a_file_that_is_not_there_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--rtt", str(tmp_path / "none.csv")])
    assert "none.csv" in capsys.readouterr().err


@pytest.mark.skipif(not LATENCY.exists(), reason="the measured matrices are not beside the project")
def test_azure_regions_are_found_better_than_by_serf():
    rtt_ms = load_rtt(LATENCY / "azure_rtt_ms.csv").rtt_ms
    ours, serfs = (coordinate_error(rtt_ms, 60, 1, name) for name in ("isthmus", "serf"))
    assert ours["median"] < serfs["median"]
    assert ours["p90"] < serfs["p90"] / 1.5
