"""The threads and the memory that this process may use. Nothing here needs PyTorch.

Linux describes both in files, which containers limit further by cgroups (version 1 or 2). On other systems, where there
are no such files, the libraries' own defaults apply.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from math import ceil
from pathlib import Path

_ROOT = Path("/")

#: Environment variables by which users set the number of threads of PyTorch and of other libraries.
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def default_threads(of_torch: int | None = None, *, root: Path = _ROOT) -> int | None:
    """Return the number of threads that a runtime uses unless an option sets it; None means the runtime's own default.

    It is one for each physical core that this process may run on, within its cgroup's quota of CPU time. A number that
    the user has set by `torch.set_num_threads` or OMP_NUM_THREADS takes precedence.

    Args:
        of_torch: `torch.get_num_threads()`; None if PyTorch is not in use.
        root: the folder with the system's files, for tests.
    """
    cpus = _cpus()
    cores = physical_cores(cpus, root=root)
    if of_torch is not None:
        # PyTorch starts with the number of cores, or of CPUs, and does not know quotas. Any other number was set.
        if cores is None or of_torch not in (cores, len(cpus)) or any(name in os.environ for name in _VARIABLES):
            return of_torch
    elif (given := os.environ.get(_VARIABLES[0], "")).isdigit() and int(given) > 0:
        return int(given)
    quota = cpu_quota(root=root)
    return cores if cores is None or quota is None else max(1, min(cores, ceil(quota)))


#: The fields of /proc/cpuinfo that tell kinds of processors apart, on x86 and on Arm.
_CPU_FIELDS = frozenset(
    {
        "vendor_id", "cpu family", "model", "model name", "stepping", "flags",
        "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features",
    }
)  # fmt: skip


def cpu_model(*, root: Path = _ROOT) -> str:
    """Return a description of the processor's kind and of its instructions, for comparison with another one."""
    first = (_text(root / "proc/cpuinfo") or "").partition("\n\n")[0]
    lines = [line for line in first.splitlines() if line.partition(":")[0].strip() in _CPU_FIELDS]
    return "\n".join([platform.machine(), platform.processor(), *lines])


def _cpus() -> set[int]:
    """Return the logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def physical_cores(cpus: set[int], *, root: Path = _ROOT) -> int | None:
    """Return the number of physical cores to which the logical CPUs belong; None if the system does not report it."""
    folder = root / "sys/devices/system/cpu"
    siblings = [_text(folder / f"cpu{cpu}/topology/thread_siblings_list") for cpu in cpus]
    return len(set(siblings)) if siblings and None not in siblings else None


def cpu_quota(*, root: Path = _ROOT) -> float | None:
    """Return the number of CPUs whose time the cgroups grant this process; None if there is no limit."""
    limits = []
    for folder in _cgroups("cpu", root):
        if (text := _text(folder / "cpu.max")) is not None:  # version 2: "200000 100000" or "max 100000"
            quota, _, period = text.partition(" ")
        else:
            quota, period = (_text(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit():  # version 1 has the quota -1 for no limit
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def physical_memory() -> int:
    """Return the machine's memory in bytes; 16 GB if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return 16 * 10**9


def available_memory(*, root: Path = _ROOT) -> int | None:
    """Return how many bytes this process can still allocate without swapping; None if the system does not report it."""
    lines = (_text(root / "proc/meminfo") or "").splitlines()
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    for folder in _cgroups("memory", root):
        limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes") or ""
        used = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes") or ""
        if limit.isdigit() and used.isdigit():
            # Cached files count as used, but the system drops them when memory is needed.
            stat = dict(line.split(" ", 1) for line in (_text(folder / "memory.stat") or "").splitlines())
            cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            free.append(max(0, int(limit) - int(used) + cached))
    return min(free, default=None)


def _cgroups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of the cgroups that limit this process, from its own up to the root."""
    base = root / "sys/fs/cgroup"
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Version 2 has one tree, and no names of controllers; in version 1 each controller has its own tree.
        tree = (
            base if not controllers else next((p for p in (base / controllers, base / controller) if p.is_dir()), base)
        )
        own = tree / path.lstrip("/")
        # In a container the path may be that of the host; then the root of the tree is the container's own cgroup.
        for folder in (own, *own.parents):
            if folder.is_relative_to(tree):
                yield folder


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def return_freed_memory() -> None:
    """Return freed memory to the system, which glibc would otherwise keep while the next large graph is opened."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
