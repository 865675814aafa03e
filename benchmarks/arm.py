"""Run bundles on 64-bit Arm, emulated on an x86 machine, and compare images and memory with x86's.

    python -m benchmarks.arm --root FOLDER --out benchmarks/results/arm.json
    python -m benchmarks.arm --root FOLDER --only onnxruntime --models sd --precisions float32

Correctness and memory only: the speed of an emulated program says nothing about a device, so no times are recorded.

FOLDER, outside the repository, receives everything that is missing: Debian's Python for arm64, unpacked without being
installed; wheels for aarch64; the bundles, which are exported here; and each finished row, so that an interrupted run
can be continued. PyTorch's wheel, which all targets but `onnxruntime` need, takes 5 GB. Debian or Ubuntu on x86 only.
apt and pip use their own configuration; if apt's sources have no arm64, as on Ubuntu, name a file in the format of
sources.list that does with `--sources`. `arm_machine.py` is the emulated machine.

Each run is a separate process. Its peak is the kernel's `ru_maxrss`, which on Arm includes the emulator and the code
that it has translated; `baselines` has the peaks of interpreters that only import the modules of the runs.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# None of these imports a large package: the peak of a new process counts the memory of the one that started it.
from benchmarks.arm_machine import (
    COMPILER,
    CPU,
    EMULATOR,
    ONE_THREAD,
    REPOSITORY,
    WHEELS,
    Arm,
    CrossCompiler,
    FailedError,
    Finished,
    installed,
    missing_tools,
    run,
)
from benchmarks.arm_tasks import PROMPT, STEPS


@dataclass(frozen=True)
class Target:
    """A program that runs bundles.

    Attributes:
        title: the runtime, for people.
        format: the format of its bundles.
        wheels: the sets of wheels that it needs on Arm.
        imports: the modules that its runs import, for the baseline; empty for programs in C++, and with PyTorch in
            Python, which takes nearly all of the memory.
        precisions: the precisions to try, each with all `models`.
        models: the embedded models to try.
        sequential: whether to run each bundle a second time with one graph in memory at a time.
        components: what its bundles contain, as in `export`.
        source: the folder of a program in C++, or empty for Python.
        backend: the backend of `load`, or empty for `BundlePipeline` and for programs in C++.
    """

    title: str
    format: str
    wheels: tuple[str, ...]
    imports: str
    precisions: tuple[str, ...]
    models: tuple[str, ...] = ("sd",)
    sequential: bool = False
    components: str = "denoiser"
    source: str = ""
    backend: str = ""


TARGETS: Mapping[str, Target] = {
    "onnxruntime": Target(
        "BundlePipeline, without PyTorch",
        "onnx",
        ("runtime",),
        "tgate_compile.runtime, onnxruntime, tokenizers",
        ("float32", "float16", "int8"),
        ("sd", "sdxl", "pixart", "lcm"),
        sequential=True,
        components="all",
    ),
    "aoti-cpp": Target(
        "examples/cpp with AOTInductor, cross-compiled",
        "aoti",
        ("torch",),
        "",
        ("float32", "float16", "int8"),
        source="examples/cpp",
    ),
    "executorch-cpp": Target(
        "examples/executorch, cross-compiled",
        "executorch",
        ("executorch", "torch"),
        "",
        ("float32", "float16", "int8", "int8-static"),
        source="examples/executorch",
    ),
    "executorch": Target(
        "load() of an ExecuTorch program in Python",
        "executorch",
        ("executorch", "pipelines", "torch"),
        "",
        ("float32",),
        backend="executorch",
    ),
    "openvino": Target(
        'load(..., backend="openvino") in Python',
        "onnx",
        ("openvino", "onnx", "pipelines", "torch"),
        "",
        ("float32", "int8"),
        components="all",
        backend="openvino",
    ),
}
#: Targets on devices that do not run here at all.
ELSEWHERE: Mapping[str, str] = {
    "browser": "the page runs in a browser's WebAssembly, which is the same program on every processor; it is tested "
    "in Chromium on x86, and an emulated browser would say nothing about a phone's",
    "coreml": "Core ML is part of Apple's systems, and this is Linux",
    "tensorrt": "TensorRT and TensorRT for RTX need an NVIDIA GPU, which the emulator does not have",
}


@dataclass(frozen=True)
class Case:
    """A row of the results: a target with a bundle."""

    target: str
    model: str
    precision: str
    sequential: bool = False

    @property
    def bundle(self) -> str:
        target = TARGETS[self.target]
        return f"{self.model}-{self.precision}-{target.format}-{target.components}"

    @property
    def name(self) -> str:
        return f"{self.target}-{self.model}-{self.precision}" + ("-sequential" if self.sequential else "")


def cases(targets: Sequence[str], models: Sequence[str], precisions: Sequence[str]) -> list[Case]:
    """Return the cases of these targets, models and precisions; empty means all."""
    return [
        Case(name, model, precision, sequential)
        for name, target in TARGETS.items()
        for model in target.models
        for precision in target.precisions
        for sequential in ((False, True) if target.sequential else (False,))
        if name in (targets or [name]) and model in (models or [model]) and precision in (precisions or [precision])
    ]


def words(task: str, arguments: Mapping[str, Any]) -> list[str]:
    """Return the arguments of Python that run one of `TASKS`."""
    return [str(REPOSITORY / "benchmarks" / "arm_tasks.py"), task, json.dumps(arguments, default=str)]


def on_x86(task: str, arguments: Mapping[str, Any], log: Path, **environment: str) -> Finished:
    """Run one of `TASKS` in a new Python."""
    settings = {**ONE_THREAD, "PYTHONPATH": str(REPOSITORY), **environment}
    try:
        return run([sys.executable, *words(task, arguments)], log, settings)
    except FailedError as failure:
        raise FailedError(f"on x86, {failure}") from failure


def on_arm(task: str, arguments: Mapping[str, Any], log: Path, arm: Arm, wheels: Sequence[str]) -> Finished:
    """Run one of `TASKS` in a new Python of the emulated machine."""
    return run(arm.command(arm.python, *words(task, arguments)), log, arm.environment(wheels))


class Bench:
    """The runs of one command, and their shared state."""

    def __init__(self, arm: Arm, *, again: bool = False) -> None:
        self.arm = arm
        self.again = again
        self.root = arm.root
        self.compiler = CrossCompiler(arm)
        self._refused: dict[str, str] = {}

    def row(self, case: Case) -> dict[str, Any]:
        """Return the row of a case."""
        measure = self._program if TARGETS[case.target].source else self._python
        row = {"target": case.target, "model": case.model, "precision": case.precision, "sequential": case.sequential}
        try:
            return row | {"result": "ran", **measure(case)}
        except FailedError as failure:
            return row | {"result": "failed", "reason": str(failure)}

    def kept(self, name: str, target: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what `measure` returns, which is read from the folder if the same versions have measured it before.

        Failures are tried again.
        """
        setup = {"cpu": self.arm.cpu, **{package: installed(package) for package in sorted(packages([target]))}}
        path = self.root / "results" / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() and not self.again else {}
        if found.get("setup") != setup:
            found = {"setup": setup, "measured": measure()}
            if found["measured"].get("result") != "failed":
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps(found))
        measured: dict[str, Any] = found["measured"]
        return measured

    def bundle(self, case: Case) -> Path:
        """Return the bundle of a case, after exporting it if necessary."""
        folder = self.root / "bundles" / case.bundle
        if case.bundle in self._refused:
            raise FailedError(self._refused[case.bundle])
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            target = TARGETS[case.target]
            # Without it AOTInductor would write code for the vectors of this processor.
            environment = {"ATEN_CPU_CAPABILITY": "default"} if target.format == "aoti" else {}
            arguments = {
                "model": case.model,
                "precision": case.precision,
                "format": target.format,
                "components": target.components,
                "folder": folder,
            }
            try:
                on_x86("export_bundle", arguments, self._log(f"export-{case.bundle}"), **environment)
            except FailedError as failure:
                self._refused[case.bundle] = str(failure).replace("on x86,", "it cannot be exported:", 1)
                raise FailedError(self._refused[case.bundle]) from failure
        return folder

    def baseline(self, name: str) -> dict[str, Any]:
        """Return the peaks of a program that does nothing: in Python it only imports, in C++ it has no arguments."""
        target, log = TARGETS[name], self._log(f"nothing-{name}")
        if target.source:
            command = self.arm.command(self.compiler.program(REPOSITORY / target.source))
            return {"arm_peak_bytes": run(command, log, self._environment(target), code=2).peak_bytes}
        modules = {"modules": target.imports}
        return {
            "arm_peak_bytes": on_arm("imports", modules, log, self.arm, target.wheels).peak_bytes,
            "x86_peak_bytes": on_x86("imports", modules, log).peak_bytes,
        }

    def _python(self, case: Case) -> dict[str, Any]:
        """Make the image on both machines."""
        arguments = {
            "backend": TARGETS[case.target].backend,
            "model": case.model,
            "precision": case.precision,
            "folder": self.bundle(case),
            "sequential": case.sequential,
        }
        images = {name: self._image(case, name) for name in ("arm", "x86")}
        log, wheels = self._log(case.name), TARGETS[case.target].wheels
        x86 = on_x86("draw", {**arguments, "out": images["x86"]}, log)
        arm = on_arm("draw", {**arguments, "out": images["arm"]}, log, self.arm, wheels)
        return {
            **self._compared(case, images["arm"], images["x86"]),
            "arm_peak_bytes": arm.peak_bytes,
            "x86_peak_bytes": x86.peak_bytes,
        }

    def _program(self, case: Case) -> dict[str, Any]:
        """Run the program in C++ on Arm, and its bundle in Python on x86."""
        target = TARGETS[case.target]
        original = self.bundle(case)
        bundle = self.compiler.bundle(original) if target.format == "aoti" else original
        program = self.compiler.program(REPOSITORY / target.source)
        inputs, latents = self.root / "inputs" / case.bundle, self.root / "images" / f"{case.name}-latents.npy"
        common = {"model": case.model, "precision": case.precision}
        expected, image = self._image(case, "x86"), self._image(case, "arm")
        log = self._log(case.name)
        given = on_x86("write_inputs", {**common, "bundle": original, "folder": inputs, "out": expected}, log).result
        command = self.arm.command(program, bundle, inputs, str(given["guidance_scale"]), latents)
        peak = run(command, log, self._environment(target)).peak_bytes
        on_x86("decode", {**common, "latents": latents, "out": image}, log)
        return {
            **self._compared(case, image, expected),
            "arm_peak_bytes": peak,
        }

    def _compared(self, case: Case, image: Path, expected: Path) -> dict[str, Any]:
        return on_x86("compare", {"images": image, "expected": expected}, self._log(f"{case.name}-compare")).result

    def _image(self, case: Case, machine: str) -> Path:
        (self.root / "images").mkdir(exist_ok=True)
        return self.root / "images" / f"{case.name}-{machine}.npy"

    def _log(self, name: str) -> Path:
        return self.root / "logs" / name.replace(".", "_")

    def _environment(self, target: Target) -> dict[str, str]:
        """Return a program's environment, with its libraries; PyTorch's wheel for Arm needs NVIDIA's even on a CPU."""
        folders = [
            folder
            for name in target.wheels
            for pattern in ("executorch/extension/pybindings", "torch/lib", "nvidia/*/lib")
            for folder in sorted(self.arm.wheels(name).glob(pattern))
        ]
        return {**ONE_THREAD, "LD_LIBRARY_PATH": os.pathsep.join(map(str, folders))}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder for downloads and builds, outside the repository")
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=[], help="targets")
    parser.add_argument("--models", nargs="+", choices=list(STEPS), default=[])
    every = dict.fromkeys(precision for target in TARGETS.values() for precision in target.precisions)
    parser.add_argument("--precisions", nargs="+", choices=list(every), default=[])
    parser.add_argument("--cpu", default=CPU, help="the processor to emulate, by QEMU's name")
    parser.add_argument("--sources", type=Path, help="a sources.list with arm64, instead of apt's own")
    parser.add_argument("--again", action="store_true", help="repeat measurements that the folder already has")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    check(parser, options)
    return options


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program unless it can run here."""
    if options.root is None:
        parser.error("--root FOLDER is required: a folder outside the repository, which takes up to 10 GB")
    options.root = options.root.resolve()
    if options.root.is_relative_to(REPOSITORY):
        parser.error(f"--root must be outside the repository {REPOSITORY}, but got {options.root}")
    if sys.platform != "linux" or platform.machine() != "x86_64":
        parser.error(f"this needs Linux on x86_64, but this is {sys.platform} on {platform.machine()}")
    if missing := missing_tools():
        parser.error(f"programs are missing. Run: sudo apt-get install {' '.join(missing)}")
    if not cases(options.only, options.models, options.precisions):
        parser.error("no target has such a model and precision")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    options.root.mkdir(parents=True, exist_ok=True)
    arm = Arm(options.root, options.cpu, options.sources)
    arm.prepare()
    bench = Bench(arm, again=options.again)
    chosen = cases(options.only, options.models, options.precisions)
    rows = []
    for case in chosen:
        rows.append(bench.kept(case.name, case.target, functools.partial(bench.row, case)))
        print(json.dumps(rows[-1]), flush=True)
    targets = list(dict.fromkeys(case.target for case in chosen))
    baselines = {
        name: bench.kept(f"nothing-{name}", name, functools.partial(bench.baseline, name))
        for name in targets
        if TARGETS[name].source or TARGETS[name].imports
    }
    results = {
        "command": command(options),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "speed": "not measured: an emulator's times say nothing about a device",
        "machine": machine(arm),
        "versions": {name: installed(name) for name in sorted(packages(targets))},
        "prompt": PROMPT,
        "steps": {model: {"steps": steps, "gate": gate} for model, (steps, gate) in STEPS.items()},
        "targets": {name: TARGETS[name].title for name in targets},
        "baselines": baselines,
        "rows": rows,
        "not_here": dict(ELSEWHERE),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def command(options: argparse.Namespace) -> str:
    """Return the command, without the folders of this machine."""
    chosen = {"--only": options.only, "--models": options.models, "--precisions": options.precisions}
    words = [word for name, values in chosen.items() if values for word in (name, *values)]
    words += ["--cpu", options.cpu] if options.cpu != CPU else []
    return " ".join(["python -m benchmarks.arm --root FOLDER", *words, "--out benchmarks/results/arm.json"])


def packages(targets: Collection[str]) -> set[str]:
    """Return the packages of these targets whose versions are the same on both machines."""
    return {package for target in targets for name in TARGETS[target].wheels for package in WHEELS[name][0]}


def machine(arm: Arm) -> dict[str, str]:
    """Return what ran what."""
    emulator, compiler = (
        subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
        for name in (EMULATOR, COMPILER)
    )
    return {
        "x86": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "arm": f"{arm.cpu}, emulated by {emulator}",
        "arm_python": arm.python.name,
        "compiler": compiler,
    }


if __name__ == "__main__":
    main()
