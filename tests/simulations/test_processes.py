"""A fleet starts what it was told, and whatever happens to the drill, nothing of it lives on."""

import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import psutil
import pytest

from simulations.processes import DrillError, Fleet, SiteSpec, ending_on_signals, free_ports

#: Stands in for a daemon: says where its configuration is, starts a child as a worker would be, and waits.
SLEEPER = (
    sys.executable,
    "-c",
    "import subprocess, sys, time; print(sys.argv, flush=True);"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)",
)
SITES = (SiteSpec("a", region="west"), SiteSpec("b"))


def eventually(holds, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.02)
    return False


def family(fleet):
    """Every process of every site, once each has started its child."""
    daemons = [psutil.Process(fleet.pid(name)) for name in ("a", "b")]
    assert eventually(lambda: all(daemon.children() for daemon in daemons))
    return [*daemons, *(child for daemon in daemons for child in daemon.children())]


def test_each_site_is_told_the_way_and_the_distance_to_every_other():
    distances = {frozenset(("a", "b")): 12.5}
    with Fleet(SITES, rtts_ms=distances, settings={"transport": "tcp"}, http=True, command=SLEEPER) as fleet:
        assert eventually(lambda: "--config" in fleet.log("a"))
        path = fleet.data_dir("a").with_suffix(".toml")
        config = tomllib.loads(path.read_text())
    assert config == {
        "site": "a",
        "listen": fleet.address("a"),
        "join": [fleet.address("b")],
        "data_dir": str(fleet.data_dir("a")),
        "device": ["cpu,threads=1"],
        "region": "west",
        "http": fleet.http_address("a"),
        "transport": "tcp",
        "emulate": {fleet.address("b"): 12.5},
    }
    assert not path.exists()


def test_leaving_the_block_ends_daemons_and_their_children():
    with Fleet(SITES, command=SLEEPER) as fleet:
        processes = family(fleet)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def test_a_kill_takes_the_whole_site_and_no_other():
    with Fleet(SITES, command=SLEEPER) as fleet:
        processes = family(fleet)
        children = psutil.Process(fleet.pid("a")).children()
        fleet.kill("a")
        assert not fleet.alive("a")
        assert eventually(lambda: not any(child.is_running() for child in children))
        assert fleet.alive("b")
        fleet.check()
        fleet.start("a")
        assert fleet.alive("a")
    assert eventually(lambda: not any(process.is_running() for process in processes))


def test_a_drill_that_is_killed_leaves_nothing_behind():
    code = f"""
import time
from simulations.processes import Fleet, SiteSpec
with Fleet([SiteSpec("a"), SiteSpec("b")], command={SLEEPER!r}) as fleet:
    print(fleet.pid("a"), fleet.pid("b"), fleet.data_dir("a").parent, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as drill:
        first, second, root = drill.stdout.readline().split()
        pids = [int(first), int(second)]
        assert all(psutil.pid_exists(pid) for pid in pids)
        drill.kill()
    assert eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    assert eventually(lambda: not Path(root).exists())


def test_a_daemon_that_ends_by_itself_is_reported_with_its_last_words():
    mute = (sys.executable, "-c", "import sys; print('first'); print('error: no such thing'); sys.exit(7)")
    with Fleet(SITES[:1], command=mute) as fleet:
        assert eventually(lambda: not fleet.alive("a"))
        with pytest.raises(DrillError, match="a: the peer ended with exit code 7: error: no such thing"):
            fleet.check()


def test_free_ports_are_free_for_both_protocols():
    ports = free_ports(5)
    assert len(set(ports)) == 5
    for port in ports:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with socket.socket(socket.AF_INET, kind) as probe:
                probe.bind(("127.0.0.1", port))


def test_a_polite_end_unwinds_the_block():
    with pytest.raises(SystemExit) as ended, ending_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
