from __future__ import annotations

import json
import select
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from mesh.devices.calibration import Speed
from mesh.devices.local import LocalDevice, discover
from mesh.errors import ConfigError, DeadlineExceeded, MeshError, WorkerError


@dataclass(frozen=True)
class Settings:
    device: tuple[str, ...] = ("cpu,threads=1,memory=200MiB,flops=1e11,bandwidth=2e10",)
    reserve: float = 0.1


def _script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


async def test_the_daemon_learns_its_devices_from_another_process(tmp_path: Path) -> None:
    (local,) = await discover(Settings(), tmp_path)
    assert local.device.name == "cpu0"
    assert local.device.memory_bytes == 200 * 2**20
    assert local.device.reserve == 0.1
    assert (local.torch_device, local.threads) == ("cpu", 1)


async def test_a_refused_spec_is_the_same_error_in_the_daemon(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more than the"):
        await discover(Settings(("cpu,memory=900TiB",)), tmp_path)


@pytest.mark.parametrize(
    ("script", "error", "said"),
    [
        ("", WorkerError, "it printed nothing of use"),
        ("print('hello')", WorkerError, "status 0"),
        ("print('[]')", WorkerError, "status 0"),
        ("print('[{}]')", WorkerError, "status 0"),
        ("print('[5]')", WorkerError, "status 0"),
        ("print('{}')", WorkerError, "status 0"),
        ("import os; os.kill(os.getpid(), 9)", WorkerError, "status -9"),
        ("raise SystemExit('torch is broken')", WorkerError, "status 1: torch is broken"),
        ("""print('{"error": "config", "message": "no"}')""", ConfigError, "^no$"),
        ("""print('{"error": "new", "message": "no"}')""", MeshError, "^no$"),
    ],
)
async def test_a_discovery_that_fails_is_one_line(
    tmp_path: Path, script: str, error: type[MeshError], said: str
) -> None:
    with pytest.raises(error, match=said) as caught:
        await discover(Settings(), tmp_path, command=_script(script))
    assert "\n" not in str(caught.value)


async def test_a_discovery_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(DeadlineExceeded, match=r"within 0\.2 s"):
        await discover(Settings(), tmp_path, timeout_s=0.2, command=_script("import time; time.sleep(60)"))


async def test_an_interpreter_that_is_gone_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="cannot start /nowhere/python: No such file"):
        await discover(Settings(), tmp_path, command=["/nowhere/python"])


def test_the_daemons_side_never_loads_torch() -> None:
    code = "import sys, mesh.devices.local; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_the_command_measures_once_and_remembers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mesh.devices import __main__ as command

    measured: list[int] = []

    def measure(load_torch: object, found: object, threads: int) -> Speed:
        measured.append(threads)
        return Speed({"float32": threads * 1e11}, 2e10, steady=threads != 3)

    monkeypatch.setattr(command, "_measured", measure)
    monkeypatch.setattr(command.platformdirs, "user_cache_path", lambda *names, **options: tmp_path / "shared")
    arguments = ["--cache", str(tmp_path), "--device", "cpu,threads=1", "--device", "cpu,threads=2"]
    for _ in range(2):
        assert command.main(arguments) == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert [LocalDevice.from_dict(entry).device.flops["float32"] for entry in json.loads(line)] == [1e11, 2e11]
    assert measured == [1, 2]
    assert command.main(["--cache", str(tmp_path / "another peer"), *arguments[2:]]) == 0
    assert measured == [1, 2]
    capsys.readouterr()
    for _ in range(2):  # measured on a busy machine: used, and measured again
        assert command.main(["--cache", str(tmp_path), "--device", "cpu,threads=3"]) == 0
    assert measured == [1, 2, 3, 3]


def test_the_command_refuses_in_json_with_the_errors_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mesh.devices.__main__ import main

    assert main(["--cache", str(tmp_path), "--device", "cpu,memry=1GB"]) == ConfigError.exit_code
    document = json.loads(capsys.readouterr().out)
    assert document["error"] == "config"
    assert "did you mean 'memory'?" in document["message"]


def test_an_orphan_does_not_live_on(tmp_path: Path) -> None:
    """The asker dies; the discovery, which would wait a minute, closes its standard output within seconds."""
    orphan = (
        "import time; from mesh.devices import __main__ as command; "
        "command._end_with_parent(0.05); print('up', flush=True); time.sleep(60)"
    )
    asker = f"import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', {orphan!r}]); sys.stdin.read(1)"
    with subprocess.Popen([sys.executable, "-c", asker], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.kill()
        reader, _, _ = select.select([process.stdout], [], [], 10.0)
        assert reader
        assert process.stdout.read() == b""
