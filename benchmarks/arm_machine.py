"""The emulated 64-bit Arm machine of `benchmarks/arm.py`, and programs compiled for it.

Debian's packages are unpacked into a folder without being installed, and wheels for aarch64 beside them. QEMU's user
mode runs one program at a time and finds its libraries there; it needs no privileges and no virtual machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Only the standard library: the peak of a new process counts the memory of the one that started it.

REPOSITORY = Path(__file__).resolve().parents[1]
#: The emulated core, found in phones since 2018: with dot products and float16, without scalable vectors.
CPU = "cortex-a76"
#: The kernel's description of this core. Without it, emulated programs would read that of the x86 machine.
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
PIP = ("pip", "install", "--no-compile", "--only-binary=:all:", "--implementation=cp")
#: Python, the libraries that wheels expect, and Python as a library, which ExecuTorch's runtime needs.
DEBIAN = ("python3", "libstdc++6", "libgomp1", "libpython3-dev")

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

#: Sets of wheels, with whether their dependencies are installed too. ExecuTorch names all that its converters need.
WHEELS: Mapping[str, tuple[tuple[str, ...], bool]] = {
    "runtime": (("numpy", "onnxruntime", "pydantic", "tokenizers", "pillow"), True),
    "torch": (("torch", "numpy"), True),
    "pipelines": (("diffusers", "transformers", "tokenizers", "numpy", "pillow", "pydantic"), True),
    "onnx": (("onnx",), True),
    "openvino": (("openvino",), False),
    "executorch": (("executorch", "torchao", "tabulate", "ruamel.yaml", "flatbuffers", "tqdm", "pyyaml"), False),
}


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


def run(
    command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None, code: int = 0
) -> Finished:
    """Run a command to its end, which should be with the exit code `code`; `log` receives its output and its errors.

    Raises:
        FailedError: it ends with another code. The message is the last line of its errors, or the
            signal that killed it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    output, errors = log.with_suffix(".out"), log.with_suffix(".err")
    with output.open("w") as out, errors.open("w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, **(environment or {})})
        _, status, usage = os.wait4(process.pid, 0)  # the only call that returns the peak of this one process
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != code:
        raise FailedError(reason(process.returncode, errors.read_text(errors="replace")))
    return Finished(output.read_text(errors="replace"), usage.ru_maxrss * 1024)


def needed(command: Sequence[str | Path], log: Path) -> None:
    """Run a command without which nothing can be measured; end the program if it fails."""
    try:
        run(command, log)
    except FailedError as failure:
        raise SystemExit(f"{command[0]} failed: {failure}\nIts output is in {log}.out and .err.") from failure


def reason(code: int, errors: str) -> str:
    """Return why a process ended with this exit code, without the folders of this machine."""
    if code < 0:
        return f"the process was killed by {signal.Signals(-code).name}"
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "no message")
    named = re.sub(r"^(?:\w+\.)+(?=\w+: )", "", last)
    return re.sub(r"(?<![\w.])/(?:[^\s/'\":]+/)+", "", named)


@dataclass(frozen=True)
class Arm:
    """The emulated machine in the folder `root`. Packages are installed when they are needed."""

    root: Path
    cpu: str = CPU
    sources: Path | None = None

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
        """Let apt resolve and download the packages with a separate state, in which nothing is installed."""
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
        needed(["apt-get", *options, "update"], log)
        needed(["apt-get", *options, "--yes", "--download-only", "install", *DEBIAN], log)
        for package in sorted((apt / "cache" / "archives").glob("*.deb")):
            needed(["dpkg-deb", "--extract", package, self.system], log)

    def wheels(self, name: str) -> Path:
        """Return the folder of a set of wheels, in the versions that are installed here."""
        folder, done = self.root / "wheels" / name, self.root / "wheels" / f"{name}.done"
        packages, dependencies = WHEELS[name]
        wanted = [f"{package}=={installed(package)}" for package in packages]
        if not done.exists() or done.read_text().split() != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            tags = [f"manylinux_2_{minor}_aarch64" for minor in range(17, glibc(self.system) + 1)]
            options = [f"--python-version={self.python.name.removeprefix('python')}", "--target", folder]
            options += [f"--platform={tag}" for tag in ("manylinux2014_aarch64", *tags)]
            options += [] if dependencies else ["--no-deps"]
            needed([sys.executable, "-m", *PIP, *options, *wanted], self.root / "logs" / f"pip-{name}")
            done.write_text("\n".join(wanted))
        return folder

    def command(self, program: Path, *arguments: str | Path) -> list[str | Path]:
        """Return the command that runs an Arm program on the emulated processor."""
        return [EMULATOR, "-cpu", self.cpu, "-L", self.system, program, *arguments]

    def environment(self, wheels: Sequence[str]) -> dict[str, str]:
        """Return the environment of a Python program that needs these sets of wheels."""
        paths = [*(self.wheels(name) for name in wheels), REPOSITORY]
        return {**ONE_THREAD, "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONDONTWRITEBYTECODE": "1"}


def installed(package: str) -> str:
    """Return the version of a package here, without the part that names a build (`+cpu`)."""
    return version(package).partition("+")[0]


def glibc(system: Path) -> int:
    """Return the minor version of the C library in `system`, which determines the wheels that it can load."""
    (library,) = {path.resolve() for path in system.glob("**/aarch64-linux-gnu/libc.so.6")}
    found = re.search(rb"GNU C Library [^\n]* version 2\.(\d+)", library.read_bytes())
    assert found is not None
    return int(found[1])


def missing_tools() -> list[str]:
    """Return the packages of the programs that are not installed."""
    return sorted({package for program, package in TOOLS.items() if shutil.which(program) is None})


class CrossCompiler:
    """Compiles the examples in C++, and AOTInductor's code, for the emulated machine."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        self._home = arm.root / "programs"

    def _compile(self, *arguments: str | Path, for_torch: bool = True) -> None:
        torch = self.arm.wheels("torch") / "torch"
        headers = [f"-I{torch / folder}" for folder in ("include", "include/torch/csrc/api/include")]
        libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
        flags = ["-std=c++20", "-w", "-ffp-contract=off", "-Wl,--allow-shlib-undefined"]
        given = [*headers, "-fopenmp", *arguments, *libraries] if for_torch else arguments
        run([COMPILER, *flags, *given], self._home / "compiler")

    def program(self, source: Path) -> Path:
        """Return the program in the folder `source`, an example for AOTInductor or ExecuTorch."""
        program = self._home / source.name
        if not program.exists():
            self._home.mkdir(exist_ok=True)
            arguments = ["-O1", source / "denoise.cpp", "-o", program]
            if source.name == "cpp":
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

    def bundle(self, bundle: Path) -> Path:
        """Return a copy of an AOTInductor bundle in which the code has been compiled for Arm, from the C++ inside.

        The hash in its manifest is that of the original package. Programs in C++ do not compare it.
        """
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
        home = self._home / "build"
        home.mkdir(parents=True, exist_ok=True)
        objects = []
        for name in (name for name in members if name.endswith(".cpp") and Path(name).parent == Path(library).parent):
            source = home / Path(name).name
            source.write_bytes(members[name])
            objects.append(source.with_suffix(".o"))
            # The same settings as Inductor's own: the wrapper is long, and does not need optimization.
            level = "-O1" if name.endswith(".wrapper.cpp") else "-O2"
            self._compile(level, "-fPIC", *DEFINITIONS, "-c", source, "-o", objects[-1])
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
