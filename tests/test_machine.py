"""The default number of threads and the free memory, read from folders like Linux's, in both cgroup versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tgate_compile._machine import available_memory, cpu_quota, default_threads, physical_cores

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="other systems have no such files")

GIB = 2**30


def system(root: Path, files: dict[str, str], *, siblings: dict[int, str] | None = None) -> Path:
    """Write `files` and the topology of the CPUs below `root`."""
    for cpu, others in (siblings or {}).items():
        files |= {f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{others}\n"}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def alone(root: Path, files: dict[str, str]) -> Path:
    """Return a system on which every CPU of this process is a separate core."""
    return system(root, files, siblings={cpu: str(cpu) for cpu in os.sched_getaffinity(0)})


def test_two_hyperthreads_are_one_core(tmp_path: Path) -> None:
    root = system(tmp_path, {}, siblings={0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"})
    assert physical_cores({0, 1, 2, 3}, root=root) == 2
    assert physical_cores({0, 2}, root=root) == 1
    assert physical_cores({0, 1}, root=root) == 2
    assert physical_cores({0, 9}, root=root) is None


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        # The cgroup above this one has a lower limit.
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
            },
            2.0,
        ),
        # The path of the host, which does not exist in the container.
        ({"proc/self/cgroup": "0::/docker/12\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1.0),
        # Version 1.
        (
            {
                "proc/self/cgroup": "4:memory:/\n2:cpu,cpuacct:/jobs\n1:name=systemd:/\n",
                "sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
    ],
)
def test_quotas(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert cpu_quota(root=system(tmp_path, files)) == quota


def test_a_quota_limits_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    cores = len(os.sched_getaffinity(0))
    root = alone(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"})
    assert default_threads(cores, root=root) == 1
    assert default_threads(root=root) == 1
    assert default_threads(cores, root=alone(tmp_path / "without", {})) == cores


def test_settings_of_the_user_take_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = alone(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"})
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert default_threads(cores + 3, root=root) == cores + 3  # torch.set_num_threads
    monkeypatch.setenv("OMP_NUM_THREADS", str(cores))
    assert default_threads(cores, root=root) == cores
    assert default_threads(root=root) == cores


def test_a_system_without_these_files_keeps_the_runtimes_default(tmp_path: Path) -> None:
    assert default_threads(3, root=tmp_path) == 3
    assert available_memory(root=tmp_path) is None


def test_this_machine() -> None:
    assert default_threads(torch.get_num_threads()) == torch.get_num_threads()  # the tests set one thread
    memory = available_memory()
    assert memory is not None
    assert 0 < memory <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_memory_is_that_of_the_machine_or_of_the_cgroup(tmp_path: Path) -> None:
    meminfo = {"proc/meminfo": "MemTotal:       9000000 kB\nMemAvailable:    8388608 kB\n"}
    assert available_memory(root=system(tmp_path / "bare", dict(meminfo))) == 8 * GIB
    second = meminfo | {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
        "sys/fs/cgroup/memory.stat": f"anon {2 * GIB}\ninactive_file {GIB}\n",
    }
    assert available_memory(root=system(tmp_path / "two", second)) == 2 * GIB
    first = meminfo | {
        "proc/self/cgroup": "4:memory:/job\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{3 * GIB}\n",
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{2 * GIB}\n",
    }
    assert available_memory(root=system(tmp_path / "one", first)) == GIB
