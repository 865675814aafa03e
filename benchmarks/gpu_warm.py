"""Fill Inductor's cache with the code of `gpu.py`, in one process for each contender, or two.

    python benchmarks/gpu_warm.py sdxl tgate_cuda_graphs plain_compiled plain_cuda_graphs

Lowering a graph keeps one core busy for minutes, so contenders are compiled side by side before they are measured one
after another. A method's graphs are shared out between two processes, which compile them without running them. For the
plain pipeline a process makes one image.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

#: The number of processes that share the graphs of a method.
PARTS = 2

#: Threads that compile kernels, in each of the processes.
_THREADS = "4"


def main(arguments: Sequence[str] | None = None) -> int:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", _THREADS)  # read when torch._inductor is imported
    import gpu

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models, keys = ["sdxl", "sd15", "pixart_alpha"], [contender.key for contender in gpu.CONTENDERS]
    parser.add_argument("model", choices=models)
    parser.add_argument("contenders", nargs="+", choices=keys, metavar="contender", help=f"one of {', '.join(keys)}")
    parser.add_argument("--part", type=int, choices=range(PARTS), help="compile only this part of a method's graphs")
    parser.add_argument("--minutes", type=float, default=4.5, help="time after which the processes are stopped")
    gpu.add_choices(parser)
    given = parser.parse_args(arguments)
    if len(given.contenders) == 1 and (given.part is not None or given.contenders[0].startswith(gpu.PLAIN)):
        fill(given, parser)
        return 0
    return side_by_side(given)


def fill(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Compile one contender by making an image with it."""
    import gpu

    contender = next(each for each in gpu.CONTENDERS if each.key == given.contenders[0])
    device, dtype = gpu.checked_device(parser, given)
    (suite,) = gpu.suites_for([given.model], tiny=given.tiny)
    bench = gpu.Bench(suite, device, dtype, given.backend)
    began = time.monotonic()
    if given.part is None:
        pipe, ready = bench.ready(contender, suite.gates[0])
        bench.generate(pipe, ready)
        what = ""
    else:
        what = " " + " and ".join(bench.compile_graphs(contender.method, given.part, PARTS))
    print(f"{given.model} {contender.key}{what}: {time.monotonic() - began:.1f} s", flush=True)


def side_by_side(given: argparse.Namespace) -> int:
    """Run the processes of all contenders, and return the number of those that failed or took too long."""
    choices = ["--device", given.device, "--backend", given.backend, *(["--tiny"] if given.tiny else [])]
    script = str(Path(__file__).resolve())
    until = time.monotonic() + 60 * given.minutes
    work = {}
    for key in given.contenders:
        parts = [[]] if key.startswith("plain") else [["--part", str(part)] for part in range(PARTS)]
        work |= {" ".join([key, *part]): [key, *part] for part in parts}
    processes = {
        name: subprocess.Popen([sys.executable, script, given.model, *arguments, *choices])
        for name, arguments in work.items()
    }
    failed = 0
    for key, process in processes.items():
        try:
            status: int | str = process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = "out of time"
        if status:
            failed += 1
            print(f"{given.model} {key}: failed ({status})", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
