from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mesh.errors import ConfigError, DataDirInUse
from mesh.peer import datadir
from mesh.peer.datadir import INCARNATION_FILE, LOCK_FILE, DataDir, write_atomically

_HOLD = (
    "import sys, pathlib; from mesh.peer.datadir import DataDir\n"
    "with DataDir(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
)


def _holder(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_peer_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "not" / "yet"
    with DataDir(path):
        with pytest.raises(DataDirInUse) as caught, DataDir(path):
            pass
        assert str(path) in str(caught.value)
        assert f"process id {os.getpid()};" in str(caught.value)
    with DataDir(path):
        pass
    assert path.stat().st_mode & 0o077 == 0


def test_a_killed_peer_blocks_nothing(tmp_path: Path) -> None:
    with _holder(tmp_path) as process:
        with pytest.raises(DataDirInUse, match=f"process id {process.pid};"), DataDir(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
        with DataDir(tmp_path):
            assert (tmp_path / LOCK_FILE).read_text() == f"{os.getpid()}\n"


def test_a_worker_that_outlives_its_daemon_does_not_hold_the_directory(tmp_path: Path) -> None:
    directory = DataDir(tmp_path)
    with directory:
        worker = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        with DataDir(tmp_path):
            pass
    finally:
        worker.communicate(timeout=10)


def test_incarnations_only_rise(tmp_path: Path) -> None:
    with DataDir(tmp_path) as directory:
        assert [directory.next_incarnation() for _ in range(3)] == [1, 2, 3]
        directory.record_incarnation(10)
        directory.record_incarnation(5)
    with DataDir(tmp_path) as directory:
        assert directory.next_incarnation() == 11


@pytest.mark.parametrize("content", [b"", b"-4", b"many", b"9" * 40, b"\xff", "٣".encode()])
def test_a_damaged_incarnation_gives_way_to_the_clock(tmp_path: Path, content: bytes) -> None:
    (tmp_path / INCARNATION_FILE).write_bytes(content)
    with DataDir(tmp_path, now=lambda: 1_800_000_000.5) as directory:
        assert directory.next_incarnation() == 1_800_000_001
        assert directory.next_incarnation() == 1_800_000_002


def test_a_full_disk_is_one_line_and_keeps_the_old_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with DataDir(tmp_path) as directory:
        directory.next_incarnation()
        with monkeypatch.context() as patch:
            patch.setattr(datadir.os, "fsync", full)
            with pytest.raises(ConfigError, match=r"no space left; free some or give another with --data-dir$"):
                directory.next_incarnation()
        assert directory.next_incarnation() == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [INCARNATION_FILE, LOCK_FILE]


def test_a_path_that_cannot_be_a_directory_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"cannot be used \(.*\); give another with --data-dir$"), DataDir(path):
            pass


def test_a_file_system_without_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(datadir.fcntl, "flock", none)
    with pytest.raises(ConfigError, match="has no file locks; give a local one"), DataDir(tmp_path):
        pass


def test_writing_replaces_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *arguments: (_ for _ in ()).throw(OSError(errno.EIO, "torn")))
        with pytest.raises(OSError, match="torn"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
