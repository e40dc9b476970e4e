"""The command as a process: start-up time, signals, pipes, and the verbs that hand over to others."""

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from mesh.cli import main
from mesh.errors import ConfigError

MESH = [sys.executable, "-c", "import sys; from mesh.cli import main; sys.exit(main())"]


def test_help_needs_no_network_library():
    code = (
        "import sys; from mesh.cli import main; main(['--help']); "
        "print(*{'grpc', 'trio', 'torch', 'networkx', 'pydantic'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr.strip() == ""
    for verb in ("up", "status", "topology", "plan", "submit", "generate", "jobs", "cancel", "demo"):
        assert f"\n  {verb} " in done.stdout


@pytest.mark.parametrize("verb", ["status", "topology", "plan", "submit", "generate", "jobs", "cancel"])
def test_every_verb_takes_json_and_peer(verb, capsys):
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--json" in text and "--peer" in text and "--debug" in text


def test_ctrl_c_ends_a_stream_with_130_and_cancels_the_request(peer):
    assert main(["submit", "mute/after3", "--no-wait"]) == 0
    process = subprocess.Popen([*MESH, "generate", "job-1", "x"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(len("The sea is")) == b"The sea is"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and b"Traceback" not in err and b"error" not in err and out in (b"", b"\n")
    assert peer.cancelled.wait(5)


def test_ctrl_c_while_loading_says_that_the_job_goes_on(peer):
    process = subprocess.Popen([*MESH, "submit", "slow/load"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline_s = time.monotonic() + 20
    while not peer.jobs and time.monotonic() < deadline_s:
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, b"")
    assert err == b"job job-1 goes on without this command; `mesh cancel job-1` ends it\n"


def test_a_closed_pipe_is_quiet(peer):
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen([*MESH, "status"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (141, b"")


def test_demo_hands_its_arguments_to_the_entry_point(monkeypatch, capsys):
    point = EntryPoint("demo", f"{__name__}:fake_demo", "isthmus.commands")
    monkeypatch.setattr("mesh.cli.demo.entry_points", lambda **_: EntryPoints([point]))
    assert main(["demo", "--json", "out.json", "--seed", "3", "--help"]) == 3
    assert capsys.readouterr().out == "['--json', 'out.json', '--seed', '3', '--help']\n"


def fake_demo(arguments: list[str]) -> int:
    print(arguments)
    return 3


def test_demo_without_the_drill_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr("mesh.cli.demo.entry_points", lambda **_: EntryPoints())
    assert main(["demo"]) == 1
    assert capsys.readouterr().err.startswith("error: this installation brings no demo")


def test_up_passes_only_what_was_given(monkeypatch, tmp_path):
    import types

    seen: list[object] = []
    config = types.ModuleType("mesh.peer.config")
    config.load = lambda cli, env, toml_path, has_identity: seen.append((cli, toml_path)) or "config"
    daemon = types.ModuleType("mesh.peer.daemon")
    daemon.run = seen.append
    monkeypatch.setitem(sys.modules, "mesh.peer.config", config)
    monkeypatch.setitem(sys.modules, "mesh.peer.daemon", daemon)
    assert main(["up"]) == 0
    device = "cpu,threads=1,memory=200MiB"
    arguments = ["--site", "a", "--join", "h:1", "--join", "h:2", "--device", device, "--data-dir", str(tmp_path)]
    assert main(["up", *arguments, "--config", "x.toml"]) == 0
    assert seen[0] == ({}, None) and seen[1] == seen[3] == "config"
    given = {"site": "a", "join": ["h:1", "h:2"], "device": [device], "data_dir": str(tmp_path)}
    assert seen[2][0] == given and str(seen[2][1]) == "x.toml"


def test_ups_errors_exit_with_their_code(monkeypatch, capsys):
    import types

    def load(cli, env, toml_path, has_identity):
        raise ConfigError("listen: 'x' is not HOST:PORT")

    config = types.ModuleType("mesh.peer.config")
    config.load = load
    daemon = types.ModuleType("mesh.peer.daemon")
    daemon.run = None
    monkeypatch.setitem(sys.modules, "mesh.peer.config", config)
    monkeypatch.setitem(sys.modules, "mesh.peer.daemon", daemon)
    assert main(["up", "--listen", "x"]) == 2
    assert capsys.readouterr().err == "error: listen: 'x' is not HOST:PORT\n"
