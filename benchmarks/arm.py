"""Run bundles on 64-bit Arm, emulated on an x86 machine, and compare images and memory with x86's.

    python -m benchmarks.arm --root FOLDER --out benchmarks/results/arm.json
    python -m benchmarks.arm --root FOLDER --only onnxruntime --models sd --precisions float32

Correctness and memory only: the speed of an emulated program says nothing about a device, so no times are recorded.

FOLDER, outside the repository, receives everything that is missing: Debian's Python for arm64, unpacked without being
installed; wheels for aarch64; the bundles, which are exported here; and each finished row, so that an interrupted run
can be continued. PyTorch's wheel, which all targets but `onnxruntime` need, takes 5 GB. Debian or Ubuntu on x86 only.
apt and pip use their own configuration; if apt's sources have no arm64, as on Ubuntu, name a file in the format of
sources.list that does with `--sources`.

Each run is a process of its own. Its peak is the kernel's `ru_maxrss`, which on Arm includes the emulator and the code
that it has translated; `baselines` has the peaks of interpreters that do nothing but import what the runs import.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Only the standard library: the peak of a new process counts the memory of the one that started it.

REPOSITORY = Path(__file__).resolve().parents[1]
PROMPT = "a large red circle on a blue background"
#: Number of steps, and the gate.
STEPS: Mapping[str, tuple[int, int]] = {"sd": (10, 4), "sdxl": (10, 4), "pixart": (10, 4), "lcm": (4, 2)}
#: Shape of the latents of one image.
LATENTS = (1, 4, 16, 16)
#: The emulated core, found in phones since 2018: with dot products and float16, without scalable vectors.
CPU = "cortex-a76"
#: What the kernel says of this core. Without it, emulated programs would read the file of the x86 machine.
CPUINFO = """processor\t: {number}
BogoMIPS\t: 100.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

"""
MIDR = "0x00000000414fd0b1\n"
EMULATOR = "qemu-aarch64-static"
COMPILER = "aarch64-linux-gnu-g++"
#: Programs, and the packages of Debian and Ubuntu that have them.
TOOLS: Mapping[str, str] = {
    EMULATOR: "qemu-user-static",
    COMPILER: "g++-aarch64-linux-gnu",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
}
#: Python, what wheels expect of a system, and Python as a library, which ExecuTorch's own needs.
DEBIAN = ("python3", "libstdc++6", "libgomp1", "libpython3-dev")

#: Sets of wheels, with whether their dependencies are installed too. ExecuTorch names all that its converters need.
WHEELS: Mapping[str, tuple[tuple[str, ...], bool]] = {
    "runtime": (("numpy", "onnxruntime", "pydantic", "tokenizers", "pillow"), True),
    "torch": (("torch", "numpy"), True),
    "pipelines": (("diffusers", "transformers", "tokenizers", "numpy", "pillow", "pydantic"), True),
    "openvino": (("openvino",), False),
    "executorch": (("executorch", "torchao", "tabulate", "ruamel.yaml", "flatbuffers", "tqdm", "pyyaml"), False),
}


@dataclass(frozen=True)
class Target:
    """A program that runs bundles.

    Attributes:
        title: what runs the graphs, for people.
        format: the format of its bundles.
        wheels: the sets of wheels that it needs on Arm.
        imports: what its runs import, for the baseline.
        precisions: the precisions to try, each with all `models`.
        models: the embedded models to try.
        sequential: whether to run each bundle a second time with one graph in memory at a time.
        source: the folder of a program in C++, or empty for Python.
    """

    title: str
    format: str
    wheels: tuple[str, ...]
    imports: str
    precisions: tuple[str, ...]
    models: tuple[str, ...] = ("sd",)
    sequential: bool = False
    source: str = ""


TARGETS: Mapping[str, Target] = {
    "onnxruntime": Target(
        "BundlePipeline, without PyTorch",
        "onnx",
        ("runtime",),
        "tgate_compile.runtime, onnxruntime, tokenizers",
        ("float32", "float16", "int8"),
        ("sd", "sdxl", "pixart", "lcm"),
        sequential=True,
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
        ("float32", "float16", "int8", "int8-dynamic", "int8-static"),
        source="examples/executorch",
    ),
    "executorch": Target(
        "load() of an ExecuTorch program in Python",
        "executorch",
        ("executorch", "pipelines", "torch"),
        "torch, diffusers, transformers, executorch.runtime",
        ("float32",),
        ("sd", "pixart"),
    ),
    "openvino": Target(
        'load(..., backend="openvino") in Python',
        "onnx",
        ("openvino", "pipelines", "torch"),
        "torch, diffusers, transformers, openvino",
        ("float32", "int8"),
        ("sd",),
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
        return f"{self.model}-{self.precision}-{TARGETS[self.target].format}"

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


class FailedError(Exception):
    """A step of a case failed; the message is the reason in its row."""


@dataclass(frozen=True)
class Finished:
    """A process that has ended.

    Attributes:
        printed: its output.
        peak_bytes: the most resident memory that it had.
    """

    printed: str
    peak_bytes: int

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object in the last line that it printed."""
        found: dict[str, Any] = json.loads(self.printed.splitlines()[-1])
        return found


def run(command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None) -> Finished:
    """Run a command to its end; `log` receives its output and its errors.

    Raises:
        FailedError: it does not succeed. The message is the last line of its errors, or the signal that killed it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    output, errors = log.with_suffix(".out"), log.with_suffix(".err")
    with output.open("w") as out, errors.open("w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, **(environment or {})})
        _, status, usage = os.wait4(process.pid, 0)  # the only call that returns the peak of this one process
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise FailedError(reason(process.returncode, errors.read_text(errors="replace")))
    return Finished(output.read_text(errors="replace"), usage.ru_maxrss * 1024)


def reason(code: int, errors: str) -> str:
    """Return why a process ended with this exit code, without the folders of this machine."""
    if code < 0:
        return f"the process was killed by {signal.Signals(-code).name}"
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "no message")
    named = re.sub(r"^(?:\w+\.)+(?=\w+: )", "", last)
    return re.sub(r"(?<![\w.])/(?:[^\s/'\":]+/)+", "", named)


@dataclass(frozen=True)
class Arm:
    """The emulated machine in the folder `root`, which gets what it needs when it needs it."""

    root: Path
    cpu: str = CPU
    sources: Path | None = None
    _ready: set[str] = field(default_factory=set, compare=False)

    @property
    def system(self) -> Path:
        return self.root / "system"

    @property
    def python(self) -> Path:
        """Debian's Python, such as `usr/bin/python3.11`."""
        (found,) = (path for path in self.system.glob("usr/bin/python3.*") if re.fullmatch(r"python3\.\d+", path.name))
        return found

    def prepare(self) -> None:
        """Download and unpack Debian's packages, and describe the processor."""
        done = self.system / "done"
        if not done.exists():
            self._unpack()
            done.touch()
        processors = range(os.cpu_count() or 1)
        files = {"proc/cpuinfo": "".join(CPUINFO.format(number=number) for number in processors)}
        for number in processors:
            files[f"sys/devices/system/cpu/cpu{number}/regs/identification/midr_el1"] = MIDR
        for name, content in files.items():
            path = self.system / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    def _unpack(self) -> None:
        """Let apt resolve and download the packages with a state of its own, in which nothing is installed."""
        apt = self.root / "apt"
        for folder in ("lists/partial", "cache/archives/partial", "state"):
            (apt / folder).mkdir(parents=True, exist_ok=True)
        (apt / "status").touch()
        settings = {
            "APT::Architecture": "arm64",
            "APT::Architectures::": "arm64",
            "APT::Install-Recommends": "0",
            "APT::Update::Post-Invoke-Success": "",
            "Dir::State": apt / "state",
            "Dir::State::lists": apt / "lists",
            "Dir::State::status": apt / "status",
            "Dir::Cache": apt / "cache",
            "Debug::NoLocking": "1",
        }
        if self.sources is not None:
            settings |= {"Dir::Etc::sourcelist": self.sources.resolve(), "Dir::Etc::sourceparts": "-"}
        options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
        log = self.root / "logs" / "apt"
        run(["apt-get", *options, "update"], log)
        run(["apt-get", *options, "--yes", "--download-only", "install", *DEBIAN], log)
        for package in sorted((apt / "cache" / "archives").glob("*.deb")):
            run(["dpkg-deb", "--extract", package, self.system], log)

    def wheels(self, name: str) -> Path:
        """Install a set of wheels of the versions that are installed here, and return its folder."""
        folder, done = self.root / "wheels" / name, self.root / "wheels" / f"{name}.done"
        if not done.exists():
            packages, dependencies = WHEELS[name]
            tag = self.python.name.removeprefix("python")
            platforms = [
                part
                for minor in range(17, glibc(self.system) + 1)
                for part in ("--platform", f"manylinux_2_{minor}_aarch64")
            ]
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--target",
                folder,
                "--upgrade",
                "--no-compile",
                "--only-binary=:all:",
                "--implementation=cp",
                f"--python-version={tag}",
                "--platform=manylinux2014_aarch64",
                *platforms,
                *([] if dependencies else ["--no-deps"]),
            ]
            run([*command, *(f"{package}=={installed(package)}" for package in packages)], self.root / "logs" / name)
            done.touch()
        return folder

    def command(self, program: Path, *arguments: str | Path) -> list[str | Path]:
        """Return the command that runs an Arm program on the emulated processor."""
        return [EMULATOR, "-cpu", self.cpu, "-L", self.system, program, *arguments]

    def environment(self, wheels: Sequence[str]) -> dict[str, str]:
        """Return the environment of a Python program that needs these sets of wheels."""
        paths = [*(self.wheels(name) for name in wheels), REPOSITORY]
        return {**ONE_THREAD, "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONDONTWRITEBYTECODE": "1"}


ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def installed(package: str) -> str:
    """Return the version of a package here, without the part that names a build (`+cpu`)."""
    return version(package).partition("+")[0]


def glibc(system: Path) -> int:
    """Return the minor version of the C library in `system`, which decides what wheels it can load."""
    (library,) = {path.resolve() for path in system.glob("**/aarch64-linux-gnu/libc.so.6")}
    found = re.search(rb"GNU C Library [^\n]* version 2\.(\d+)", library.read_bytes())
    assert found is not None
    return int(found[1])


def words(task: str, arguments: Mapping[str, Any]) -> list[str]:
    """Return the arguments of Python that run one of `TASKS`."""
    return [str(Path(__file__).resolve()), "--task", task, json.dumps(arguments, default=str)]


def on_x86(task: str, arguments: Mapping[str, Any], log: Path, **environment: str) -> Finished:
    """Run one of `TASKS` in a new Python."""
    settings = {**ONE_THREAD, "PYTHONPATH": str(REPOSITORY), **environment}
    return run([sys.executable, *words(task, arguments)], log, settings)


def on_arm(task: str, arguments: Mapping[str, Any], log: Path, arm: Arm, wheels: Sequence[str]) -> Finished:
    """Run one of `TASKS` in a new Python of the emulated machine."""
    return run(arm.command(arm.python, *words(task, arguments)), log, arm.environment(wheels))


def export_bundle(model: str, precision: str, format: str, folder: str) -> dict[str, Any]:
    """Export an embedded model; C++ programs need the DDIM scheduler."""
    import tgate_compile

    pipe = optimized(model, precision, ddim=format in ("aoti", "executorch"))
    steps, _ = STEPS[model]
    call = {"prompt": "", "num_inference_steps": steps, "guidance_scale": tgate_compile.DEMO_VARIANTS[model].guidance}
    tgate_compile.export(
        pipe,
        folder,
        format,  # type: ignore[arg-type]
        call=call,
        dynamic=False,
        components="all" if format == "onnx" else "denoiser",
        quantize=None if precision.startswith("float") else precision,  # type: ignore[arg-type]
    )
    return {}


def plain(model: str, precision: str) -> Any:
    import torch

    import tgate_compile

    torch.set_num_threads(1)
    dtype = torch.float16 if precision == "float16" else torch.float32
    pipe = tgate_compile.load_demo_pipeline(model, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def optimized(model: str, precision: str, *, ddim: bool) -> Any:
    import tgate_compile

    pipe = plain(model, precision)
    if ddim:
        from diffusers import DDIMScheduler

        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return tgate_compile.optimize(pipe, STEPS[model][1], backend="eager")


def draw(target: str, model: str, precision: str, folder: str, sequential: bool, out: str) -> dict[str, Any]:
    """Make an image of a bundle and save it; the noise is the same on every machine."""
    import numpy as np

    steps, _ = STEPS[model]
    if target == "onnxruntime":
        from tgate_compile.runtime import BundlePipeline

        program = BundlePipeline(folder, threads=1, sequential=sequential)
        np.save(out, program(PROMPT, seed=0, num_inference_steps=steps, output="numpy"))
        return {}
    import torch

    import tgate_compile

    pipe = plain(model, precision)
    tgate_compile.load(pipe, folder, backend=target, sequential=sequential)  # type: ignore[arg-type]
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(LATENTS, dtype=np.float32))
    scale = tgate_compile.DEMO_VARIANTS[model].guidance
    call = {"num_inference_steps": steps, "guidance_scale": scale, "latents": noise.to(pipe.dtype)}
    np.save(out, pipe(PROMPT, output_type="np", **call).images[0])
    return {}


def write_inputs(model: str, precision: str, folder: str, out: str) -> dict[str, Any]:
    """Write the inputs of a program in C++, and save the image that the pipeline makes of them in PyTorch."""
    import runpy

    import numpy as np
    import torch

    import tgate_compile

    pipe = optimized(model, precision, ddim=True)
    steps, _ = STEPS[model]
    with torch.no_grad():
        script = runpy.run_path(str(REPOSITORY / "examples" / "cpp" / "write_inputs.py"))
        script["write_inputs"](pipe, Path(folder), PROMPT, steps)
    latents = torch.from_numpy(np.load(Path(folder, "latents.npy"))).to(pipe.dtype)
    scale = tgate_compile.DEMO_VARIANTS[model].guidance
    call = {"num_inference_steps": steps, "guidance_scale": scale, "latents": latents}
    np.save(out, pipe(PROMPT, output_type="np", **call).images[0])
    return {"guidance_scale": scale}


def decode(model: str, precision: str, latents: str, out: str) -> dict[str, Any]:
    """Save the image of the final latents of a program in C++."""
    import numpy as np
    import torch

    pipe = plain(model, precision)
    with torch.no_grad():
        values = torch.from_numpy(np.load(latents)).to(pipe.dtype) / pipe.vae.config.scaling_factor
        images = pipe.image_processor.postprocess(pipe.vae.decode(values).sample, output_type="np")
    np.save(out, images[0])
    return {}


def compare(images: str, expected: str) -> dict[str, Any]:
    """Return the PSNR in dB, and the largest difference, of two images with values from 0 to 1.

    The PSNR of equal images is None.
    """
    import numpy as np

    first, second = (np.load(path).astype(np.float64) for path in (images, expected))
    if first.shape != second.shape or not np.isfinite(first).all():
        raise FailedError(f"the image has the shape {first.shape} and values from {first.min()} to {first.max()}")
    error = float(np.square(first - second).mean())
    return {
        "psnr_db": round(-10 * math.log10(error), 1) if error else None,
        "largest_difference": float(np.abs(first - second).max()),
    }


def imports(modules: str) -> dict[str, Any]:
    """Only import what runs import."""
    import importlib

    for module in filter(None, modules.split(", ")):
        importlib.import_module(module)
    return {}


TASKS = {task.__name__: task for task in (export_bundle, draw, write_inputs, decode, compare, imports)}


class Bench:
    """The runs of one command, with what they share."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        self.root = arm.root
        self._refused: dict[str, str] = {}

    def row(self, case: Case, *, again: bool) -> dict[str, Any]:
        """Return the row of a case, which is read from the folder if it has been finished before."""
        path = self.root / "rows" / f"{case.name}.json"
        if path.exists() and not again:
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        measure = self._program if TARGETS[case.target].source else self._python
        row = {"target": case.target, "model": case.model, "precision": case.precision, "sequential": case.sequential}
        try:
            row |= {"result": "ran", **measure(case)}
        except FailedError as failure:
            row |= {"result": "failed", "reason": str(failure)}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(row))
        return row

    def bundle(self, case: Case) -> Path:
        """Return the bundle of a case, after exporting it if necessary."""
        folder = self.root / "bundles" / case.bundle
        if case.bundle in self._refused:
            raise FailedError(self._refused[case.bundle])
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            format = TARGETS[case.target].format
            # Without it AOTInductor would write code for the vectors of this processor.
            environment = {"ATEN_CPU_CAPABILITY": "default"} if format == "aoti" else {}
            arguments = {"model": case.model, "precision": case.precision, "format": format, "folder": folder}
            try:
                on_x86("export_bundle", arguments, self._log(f"export-{case.bundle}"), **environment)
            except FailedError as failure:
                self._refused[case.bundle] = f"it cannot be exported: {failure}"
                raise FailedError(self._refused[case.bundle]) from failure
        return folder

    def baseline(self, name: str) -> dict[str, int]:
        """Return the peaks of an interpreter that imports what the runs of a target import, on both machines."""
        arguments, wheels = {"modules": TARGETS[name].imports}, TARGETS[name].wheels
        log = self._log(f"imports-{name}")
        return {
            "arm_peak_bytes": on_arm("imports", arguments, log, self.arm, wheels).peak_bytes,
            "x86_peak_bytes": on_x86("imports", arguments, log).peak_bytes,
        }

    def _python(self, case: Case) -> dict[str, Any]:
        """Make the image on both machines."""
        arguments = {
            "target": case.target,
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
            "compared_with": "the same bundle on x86",
            **self._compared(case, images["arm"], images["x86"]),
            "arm_peak_bytes": arm.peak_bytes,
            "x86_peak_bytes": x86.peak_bytes,
        }

    def _program(self, case: Case) -> dict[str, Any]:
        """Run the program in C++ on Arm, and the pipeline in PyTorch on x86."""
        target = TARGETS[case.target]
        bundle = self.bundle(case)
        if target.format == "aoti":
            bundle = self._for_arm(bundle)
        program = self._compiled(target)
        inputs, latents = self.root / "inputs" / case.bundle, self.root / "images" / f"{case.name}-latents.npy"
        common = {"model": case.model, "precision": case.precision}
        expected, image = self._image(case, "x86"), self._image(case, "arm")
        log = self._log(case.name)
        given = on_x86("write_inputs", {**common, "folder": inputs, "out": expected}, log).result
        environment = ONE_THREAD | {"LD_LIBRARY_PATH": self._libraries(target)}
        command = self.arm.command(program, bundle, inputs, str(given["guidance_scale"]), latents)
        peak = run(command, log, environment).peak_bytes
        on_x86("decode", {**common, "latents": latents, "out": image}, log)
        return {
            "compared_with": "the pipeline in PyTorch on x86",
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

    def _compile(self, *arguments: str | Path, for_torch: bool = True) -> None:
        torch = self.arm.wheels("torch") / "torch"
        headers = [f"-I{torch / folder}" for folder in ("include", "include/torch/csrc/api/include")]
        libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
        flags = ["-std=c++20", "-w", "-ffp-contract=off", "-Wl,--allow-shlib-undefined"]
        given = [*headers, "-fopenmp", *arguments, *libraries] if for_torch else arguments
        run([COMPILER, *flags, *given], self._log("compiler"))

    def _compiled(self, target: Target) -> Path:
        """Return the program of a target, compiled for Arm."""
        source = REPOSITORY / target.source
        program = self.root / "programs" / source.name
        if not program.exists():
            program.parent.mkdir(exist_ok=True)
            arguments = ["-O1", source / "denoise.cpp", "-o", program]
            if target.format == "aoti":
                self._compile(*arguments)
            else:
                self._compile(*arguments, *self._with_executorch(), for_torch=False)
        return program

    def _with_executorch(self) -> list[str | Path]:
        """Return the arguments that the example's CMake file would give, for ExecuTorch's wheel for Arm."""
        package = self.arm.wheels("executorch") / "executorch"
        (library,) = package.glob("extension/pybindings/_portable_lib*.so")
        (python,) = self.arm.system.glob("usr/lib/aarch64-linux-gnu/libpython3.*.so.1")
        headers = [REPOSITORY / "examples/cpp", package / "include"]
        headers.append(package / "include/executorch/runtime/core/portable_type/c10")
        options = [*(f"-I{folder}" for folder in headers), "-DC10_USING_CUSTOM_GENERATED_MACROS"]
        return [*options, "-Wl,--no-as-needed", f"-L{library.parent}", f"-l:{library.name}", python]

    def _libraries(self, target: Target) -> str:
        """Return the folders of a program's libraries; PyTorch's wheel for Arm needs NVIDIA's even on a CPU."""
        folders = [
            folder
            for name in target.wheels
            for pattern in ("executorch/extension/pybindings", "torch/lib", "nvidia/*/lib")
            for folder in sorted(self.arm.wheels(name).glob(pattern))
        ]
        return os.pathsep.join(map(str, folders))

    def _for_arm(self, bundle: Path) -> Path:
        """Return a copy of an AOTInductor bundle in which the code has been compiled for Arm, from the C++ inside."""
        folder = bundle.with_name(f"{bundle.name}-arm")
        if folder.exists():
            return folder
        unfinished = folder.with_name(f"{folder.name}-unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(bundle, unfinished)
        package = unfinished / "graphs" / "graphs.pt2"
        with zipfile.ZipFile(package) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        for library in [name for name in members if name.endswith(".so")]:
            members[library] = self._library(members, library)
        with zipfile.ZipFile(package, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content.replace(b"x86_64", b"aarch64") if name.endswith(".json") else content)
        unfinished.rename(folder)
        return folder

    def _library(self, members: Mapping[str, bytes], library: str) -> bytes:
        """Compile the library of a graph from its sources in the same folder of the package."""
        home = self.root / "build"
        home.mkdir(exist_ok=True)
        objects = []
        for name in (name for name in members if name.endswith(".cpp") and Path(name).parent == Path(library).parent):
            source = home / Path(name).name
            source.write_bytes(members[name])
            objects.append(source.with_suffix(".o"))
            # The same settings as Inductor's own: the wrapper is long, and does not need optimization.
            level = "-O1" if name.endswith(".wrapper.cpp") else "-O2"
            definitions = [
                "-DTORCH_INDUCTOR_CPP_WRAPPER",
                "-DSTANDALONE_TORCH_HEADER",
                "-DC10_USING_CUSTOM_GENERATED_MACROS",
            ]
            self._compile(level, "-fPIC", *definitions, "-c", source, "-o", objects[-1])
        constants = home / "constants.S"  # the weights are in a file of the bundle
        constants.write_text(NO_CONSTANTS)
        self._compile("-shared", *objects, constants, "-o", home / "graph.so")
        return (home / "graph.so").read_bytes()


#: Inductor's settings for its code, and an empty block of constants.
DEFINITIONS = ("-DTORCH_INDUCTOR_CPP_WRAPPER", "-DSTANDALONE_TORCH_HEADER", "-DC10_USING_CUSTOM_GENERATED_MACROS")
NO_CONSTANTS = """.section .rodata
.globl _binary_constants_bin_start
_binary_constants_bin_start:
.space 1
.globl _binary_constants_bin_end
_binary_constants_bin_end:
"""


def missing_tools() -> list[str]:
    """Return the packages of the programs that are not installed."""
    return sorted({package for program, package in TOOLS.items() if shutil.which(program) is None})


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder for what is downloaded and built, outside the repository")
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=[], help="targets")
    parser.add_argument("--models", nargs="+", choices=list(STEPS), default=[])
    every = dict.fromkeys(precision for target in TARGETS.values() for precision in target.precisions)
    parser.add_argument("--precisions", nargs="+", choices=list(every), default=[])
    parser.add_argument("--cpu", default=CPU, help="the processor to emulate, by QEMU's name")
    parser.add_argument("--sources", type=Path, help="a sources.list with arm64, instead of apt's own")
    parser.add_argument("--again", action="store_true", help="measure rows again that the folder has")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--task", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.task is None:
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
    if options.task is not None:
        task, given = options.task
        print(json.dumps(TASKS[task](**json.loads(given))))
        return
    options.root.mkdir(parents=True, exist_ok=True)
    arm = Arm(options.root, options.cpu, options.sources)
    arm.prepare()
    bench = Bench(arm)
    chosen = cases(options.only, options.models, options.precisions)
    rows = []
    for case in chosen:
        rows.append(bench.row(case, again=options.again))
        print(json.dumps(rows[-1]), flush=True)
    targets = dict.fromkeys(case.target for case in chosen)
    results = {
        "command": "python -m benchmarks.arm --root FOLDER --out benchmarks/results/arm.json",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "speed": "not measured: an emulator's times say nothing about a device",
        "machine": machine(arm),
        "versions": {name: installed(name) for name in sorted(pinned(targets))},
        "prompt": PROMPT,
        "baselines": {name: bench.baseline(name) for name in targets if not TARGETS[name].source},
        "rows": rows,
        "not_here": dict(ELSEWHERE),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def pinned(targets: Sequence[str] | Mapping[str, Any]) -> set[str]:
    """Return the packages whose versions are the same on both machines."""
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
