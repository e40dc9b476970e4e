from __future__ import annotations

from pathlib import Path

import psutil

from mesh.devices import cpu
from mesh.devices.cgroup import Cgroup


def test_the_cpu_of_this_machine_is_found_within_bounds() -> None:
    found = cpu.find()
    assert found.label == found.torch_device == "cpu"
    assert 0 < found.usable_bytes < found.total_bytes <= psutil.virtual_memory().total
    assert 0 < found.free_bytes <= found.total_bytes
    assert found.threads >= 1
    assert found.model


def test_a_memory_limit_is_the_memory(tmp_path: Path) -> None:
    limits = {"memory.max": str(64 * 2**20), "memory.current": str(16 * 2**20)}
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    for name, text in limits.items():
        (tmp_path / "sys/fs/cgroup" / name).write_text(text)
    found = cpu.find(tmp_path)
    assert found.total_bytes == 64 * 2**20
    assert found.usable_bytes == 32 * 2**20
    assert found.free_bytes == 48 * 2**20


def test_a_cpu_quota_bounds_threads_and_leaves_one() -> None:
    assert cpu.usable_threads(Cgroup(cpus=1.9)) == 1
    assert cpu.usable_threads(Cgroup(cpus=0.2)) == 1


def test_the_identity_holds_what_a_virtual_machine_blurs(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(
        "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
        "stepping\t: 1\nprocessor\t: 1\nmodel\t\t: 99\n"
    )
    assert cpu.identity(tmp_path) == ("amd", "AMD EPYC (25/17/1)")
