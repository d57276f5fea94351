"""Limits are found wherever the kernel keeps them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from moestream import system

GIB = 1 << 30
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_cgroups_the_machine_is_ours(tmp_path):
    assert system.cpu_count(tmp_path) == CPUS
    found = system.memory(tmp_path)
    assert found.total == psutil.virtual_memory().total
    assert 0 < found.available <= found.total
    assert found.cgroup_limit is None


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/x": "", "sys/fs/cgroup/a/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/host/path\n", "sys/fs/cgroup/cpu.max": "90000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, CPUS),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "6400000 100000\n"}, min(CPUS, 64)),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/a\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "20000\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            CPUS,
        ),
    ],
)
def test_cpu_quota(tmp_path, files, cpus):
    assert system.cpu_count(tree(tmp_path, files)) == cpus


def test_memory_limit_of_version_2_with_reclaimable_cache(tmp_path):
    total = psutil.virtual_memory().total
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/memory.max": f"{total // 64}\n",
            "sys/fs/cgroup/a/b/memory.current": f"{total // 128}\n",
            "sys/fs/cgroup/a/b/memory.stat": f"anon 1\ninactive_file {total // 512}\nactive_file {total // 512}\n",
            "sys/fs/cgroup/a/memory.max": f"{total // 32}\n",
            "sys/fs/cgroup/a/memory.current": "0\n",
        },
    )
    found = system.memory(root)
    assert found.cgroup_limit == total // 64
    room = total // 64 - total // 128 + 2 * (total // 512)
    assert found.available == min(room, found.available)
    assert found.available <= room


def test_memory_limit_of_version_1(tmp_path):
    total = psutil.virtual_memory().total
    files = {
        "proc/self/cgroup": "4:memory:/x\n",
        "sys/fs/cgroup/memory/x/memory.limit_in_bytes": f"{total // 256}\n",
        "sys/fs/cgroup/memory/x/memory.usage_in_bytes": f"{total // 256 + 4096}\n",
        "sys/fs/cgroup/memory/x/memory.stat": "inactive_file 1\ntotal_inactive_file 8192\ntotal_active_file 4096\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    }
    found = system.memory(tree(tmp_path, files))
    assert found.cgroup_limit == total // 256
    assert found.available == 8192


def test_peak_memory_is_kept_and_counts_what_was_touched():
    code = (
        "import numpy as np; from moestream import system; before = system.rss();"
        "x = np.ones(60 << 20, np.uint8); during = system.rss(); del x;"
        "print(before, during, system.rss(), system.peak_rss())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, during, after, peak = map(int, result.stdout.split())
    slack = 4 << 20  # the kernel sums its counters per CPU lazily
    assert during - before >= (60 << 20) - slack
    assert peak >= during - slack > after


def test_default_budget_leaves_room():
    budget = system.default_budget()
    assert system.rss() * 0.5 < budget < psutil.virtual_memory().total + system.rss()


@pytest.mark.parametrize(("available", "kept"), [(0, 0), (4_000, 600), (10**12, 1_500_000_000)])
def test_what_is_kept_free(available, kept):
    assert system.kept_free(available) == kept


def test_file_system_of_a_path(tmp_path):
    (tmp_path / "file").write_bytes(np.zeros(10, np.uint8).tobytes())
    found = system.file_system(tmp_path / "file")
    assert found.mount in (tmp_path / "file").resolve().parents
    assert 0 < found.free <= found.total
    with pytest.raises(FileNotFoundError):
        system.file_system(tmp_path / "missing")


def test_cpu_name(tmp_path):
    assert system.cpu_name()
    if sys.platform.startswith("linux"):
        root = tree(tmp_path, {"proc/cpuinfo": "processor\t: 0\nmodel name\t: Fast 9000\n"})
        assert system.cpu_name(root) == "Fast 9000"
        assert system.cpu_name(tmp_path / "none") != ""
