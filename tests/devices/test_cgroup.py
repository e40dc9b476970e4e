from __future__ import annotations

from pathlib import Path

from mesh.devices.cgroup import Cgroup, read_cgroup


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_version_2_limits_of_every_ancestor_hold(tmp_path: Path) -> None:
    root = _write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/outer/inner\n",
            "sys/fs/cgroup/outer/memory.max": "1000\n",
            "sys/fs/cgroup/outer/memory.current": "400\n",
            "sys/fs/cgroup/outer/memory.stat": "anon 300\ninactive_file 100\n",
            "sys/fs/cgroup/outer/inner/memory.max": "max\n",
            "sys/fs/cgroup/outer/cpu.max": "max 100000\n",
            "sys/fs/cgroup/outer/inner/cpu.max": "150000 100000\n",
        },
    )
    assert read_cgroup(root) == Cgroup(memory_limit_bytes=1000, memory_free_bytes=700, cpus=1.5)


def test_a_container_finds_its_limit_at_the_root_of_its_mount(tmp_path: Path) -> None:
    root = _write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/../../system.slice/elsewhere\n",
            "sys/fs/cgroup/memory.max": "5000\n",
            "sys/fs/cgroup/memory.current": "9000\n",
        },
    )
    assert read_cgroup(root) == Cgroup(memory_limit_bytes=5000, memory_free_bytes=0)


def test_version_1_limits_are_read_and_its_no_limit_is_none(tmp_path: Path) -> None:
    root = _write(
        tmp_path,
        {
            "proc/self/cgroup": "9:memory:/box\n4:cpu,cpuacct:/box\n1:name=systemd:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "2000\n",
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "500\n",
            "sys/fs/cgroup/memory/box/memory.stat": "total_inactive_file 50\n",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
    )
    assert read_cgroup(root) == Cgroup(memory_limit_bytes=2000, memory_free_bytes=1550, cpus=2.0)


def test_no_control_groups_mean_no_limits(tmp_path: Path) -> None:
    assert read_cgroup(tmp_path) == Cgroup()


def test_damaged_files_mean_no_limits(tmp_path: Path) -> None:
    root = _write(
        tmp_path,
        {
            "proc/self/cgroup": "garbage\n0::/x\n",
            "sys/fs/cgroup/x/memory.max": "lots\n",
            "sys/fs/cgroup/x/cpu.max": "1 0\n",
        },
    )
    assert read_cgroup(root) == Cgroup()
