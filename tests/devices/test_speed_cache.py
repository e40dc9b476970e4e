from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mesh.devices.cache import FILE_NAME, SpeedCache, undisturbed
from mesh.devices.calibration import Speed
from topology.snapshot import Decoding

SPEED = Speed({"float32": 1e11}, 2e10, decoding={"float32": Decoding(2e-4, 5e-8, 2e10)}, exchange_s=5e-5)


def test_a_speed_is_kept_for_the_next_start(tmp_path: Path) -> None:
    assert SpeedCache(tmp_path / "new").put("one", SPEED)
    assert SpeedCache(tmp_path / "new").put("two", Speed({"float32": 2e11}, 2e10))
    assert SpeedCache(tmp_path / "new").get("one") == SPEED
    assert SpeedCache(tmp_path / "new").get("three") is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"{",
        b"[]",
        b"null",
        b'{"format": 0, "speeds": {"key": {"flops": {"float32": 1e11}, "memory_bandwidth": 1e10}}}',
        b'{"format": 2, "speeds": []}',
        b'{"format": 2, "speeds": {"key": 5}}',
        b'{"format": 1, "speeds": {"key": {"flops": {"float32": 1e11}, "memory_bandwidth": 1e10}}}',
        b'{"format": 2, "speeds": {"key": {"flops": {"float32": 1e11}, "memory_bandwidth": 1e10, "decoding": 1}}}',
        b'{"format": 2, "speeds": {"key": {"flops": {"float32": 1e11}, "memory_bandwidth": 1e10, "decoding": '
        b'{"float32": {"layer_s": -1, "row_s": 0, "bandwidth": 1e10}}}}}',
        b'{"format": 2, "speeds": {"key": {"flops": {"float32": 1e11}, "memory_bandwidth": 1e10, "decoding": '
        b'{"float32": {"layer_s": 0, "row_s": 0, "bandwidth": 0}}}}}',
        b'{"format": 2, "speeds": {"key": {"flops": {"float32": 1e11}, "memory_bandwidth": 1e10, "decoding": {}, '
        b'"exchange_s": "soon"}}}',
        b'{"format": 2, "speeds": {"key": {"flops": {}, "memory_bandwidth": 1e10, "decoding": {}}}}',
        b'{"format": 2, "speeds": {"key": {"flops": {"float32": -1}, "memory_bandwidth": 1e10, "decoding": {}}}}',
        b'{"format": 2, "speeds": {"key": {"flops": {"float32": NaN}, "memory_bandwidth": 1e10, "decoding": {}}}}',
        b'{"format": 2, "speeds": {"key": {"flops": {"float32": true}, "memory_bandwidth": 1e10, "decoding": {}}}}',
        b'{"format": 2, "speeds": {"key": {"flops": {"float32": 1e11}}}}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_cache_is_ignored_and_written_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    cache = SpeedCache(tmp_path)
    assert cache.get("key") is None
    assert cache.put("key", SPEED)
    assert cache.get("key") == SPEED
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_the_cache_does_not_grow_without_bound(tmp_path: Path) -> None:
    cache = SpeedCache(tmp_path)
    for number in range(70):
        cache.put(f"{number}", SPEED)
    assert len(json.loads(cache.path.read_text())["speeds"]) == 64
    assert cache.get("69") == SPEED
    assert cache.get("0") is None


def test_a_disk_that_cannot_take_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert not SpeedCache(tmp_path / "file").put("key", SPEED)


def test_measuring_waits_for_others_and_no_longer_than_told(tmp_path: Path) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    lock = tmp_path / "lock"
    with (
        undisturbed(lock, 1.0, clock=lambda: now, sleep=sleep) as first,
        undisturbed(lock, 1.0, clock=lambda: now, sleep=sleep) as second,
    ):
        assert (first, second) == (True, False)
    assert 1.0 <= now < 1.2
    with undisturbed(lock, 1.0, clock=lambda: now, sleep=sleep) as third:
        assert third


def test_a_lock_that_is_a_trap_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "target")
    with undisturbed(tmp_path / "lock", 1.0) as held:
        assert not held
    assert not os.path.lexists(tmp_path / "target")
