"""The built distributions, and their Python versions. `.ci/run` also installs the wheel and runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

import tgate_compile
from tgate_compile._demo import DEMO_VARIANTS

ROOT = Path(__file__).parents[1]

#: The folders at the top of the tree, and the place of their files in a wheel.
HOMES = {"tgate_compile": "tgate_compile", "passes": "tgate_compile/passes", "exports": "tgate_compile/exports"}

#: Packages that have no wheels, but need a compiler or NVIDIA's index at installation.
SOURCE_ONLY = ("antlr4-python3-runtime", "tensorrt-rtx", "tensorrt-rtx-cu13")

#: The beginning of the last line of uv's error if no index can be reached.
UNREACHABLE = re.compile(
    "Failed to fetch|Could not connect|error sending request|dns error|Connection refused", re.IGNORECASE
)


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the build backend's results in `sdist/`, `wheel/` and `editable/`."""
    folder = tmp_path_factory.mktemp("built")
    for kind in ("sdist", "wheel", "editable"):
        (folder / kind).mkdir()
        build(kind, folder / kind)
    return folder


def build(kind: str, out: Path, tree: Path = ROOT) -> None:
    code = f"import hatchling.build, sys; hatchling.build.build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=tree, check=True)


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def _sources() -> Iterator[PurePosixPath]:
    """Return the library's files as paths in the tree, without the links to folders."""
    for folder in HOMES:
        for path in sorted((ROOT / folder).rglob("*")):
            relative = path.relative_to(ROOT)
            behind_link = any(parent.is_symlink() for parent in (path, *path.parents) if parent != ROOT)
            if path.is_file() and not behind_link and "__pycache__" not in relative.parts:
                yield PurePosixPath(relative.as_posix())


def _in_wheel(source: PurePosixPath) -> str:
    return str(PurePosixPath(HOMES[source.parts[0]], *source.parts[1:]))


def _code_of(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(name for name in archive.namelist() if ".dist-info/" not in name)


def test_the_wheel_has_every_file_of_the_tree_once(built: Path) -> None:
    expected = sorted(map(_in_wheel, _sources()))
    assert _code_of(only(built / "wheel", "*.whl")) == expected
    # Both sides must not be empty.
    assert {"tgate_compile/py.typed", "tgate_compile/passes/__init__.py", "tgate_compile/exports/__init__.py"} <= {
        *expected
    }
    for variant in DEMO_VARIANTS.values():
        assert any(name.startswith(f"tgate_compile/_demo/{variant.folder}/") for name in expected)


def test_the_sdist_has_every_file_once_and_builds_the_same_wheel(built: Path, tmp_path: Path) -> None:
    with tarfile.open(only(built / "sdist", "*.tar.gz")) as archive:
        names = [PurePosixPath(member.name) for member in archive.getmembers() if not member.isdir()]
        archive.extractall(tmp_path, filter="data")
    inside = [str(PurePosixPath(*name.parts[1:])) for name in names]
    assert sorted(name for name in inside if PurePosixPath(name).parts[0] in HOMES) == sorted(map(str, _sources()))
    assert len(inside) == len({*inside})
    assert {"LICENSE", "NOTICE", "README.md", "CHANGELOG.md", "constraints.txt", "pyproject.toml"} <= {*inside}

    tree = only(tmp_path, "tgate_compile-*")
    (tmp_path / "wheel").mkdir()
    build("wheel", tmp_path / "wheel", tree)
    assert _code_of(only(tmp_path / "wheel", "*.whl")) == _code_of(only(built / "wheel", "*.whl"))


def test_an_editable_install_is_a_path_and_offers_nothing_but_the_library(built: Path, tmp_path: Path) -> None:
    python = environment_with(only(built / "editable", "*.whl"), tmp_path / "venv")
    code = (
        "import importlib.util, tgate_compile, tgate_compile.exports, tgate_compile.passes.specialize\n"
        "print(tgate_compile.__file__)\n"
        "print([name for name in ('passes', 'exports', 'tests', 'training') if importlib.util.find_spec(name)])"
    )
    home, others = _output(python, "-P", "-c", code, cwd=tmp_path).splitlines()
    assert Path(home).resolve() == ROOT / "tgate_compile" / "__init__.py"
    assert others == "[]"


def environment_with(wheel: Path, folder: Path) -> Path:
    """Return the interpreter of a new virtual environment with an unpacked `wheel` and this one's packages."""
    venv.create(folder, symlinks=True)
    packages = only(folder, "lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    # A name with `z` comes after the wheel's. The .pth files in the added folder are not read.
    (packages / "z.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin" / "python"


def _output(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_metadata_has_author_purpose_and_licence(built: Path) -> None:
    with zipfile.ZipFile(only(built / "wheel", "*.whl")) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    header, _, body = metadata.partition("\n\n")
    for line in (
        f"Version: {tgate_compile.__version__}",
        "License-Expression: Apache-2.0",
        "License-File: LICENSE",
        "License-File: NOTICE",
        "Requires-Python: >=3.11",
        "Description-Content-Type: text/markdown",
        "Classifier: Typing :: Typed",
    ):
        assert line in header.splitlines(), line
    assert re.search("^(Author|Author-email): ", header, flags=re.MULTILINE)
    assert body.startswith("# tgate_compile")


def supported_versions() -> list[str]:
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    found = (re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", text) for text in classifiers)
    return [match[1] for match in found if match]


def test_the_least_version_of_python_is_the_same_everywhere(project: dict[str, Any]) -> None:
    least, *more = supported_versions()
    assert more
    assert project["project"]["requires-python"] == f">={least}"
    assert project["tool"]["ruff"]["target-version"] == f"py{least.replace('.', '')}"


@pytest.mark.heavy
@pytest.mark.parametrize("version", supported_versions())
def test_the_tested_set_has_wheels_for_every_supported_version_of_python(version: str) -> None:
    _resolve(version, ROOT / "constraints.txt", "cli", "dev")


@pytest.mark.heavy
def test_the_oldest_pytorch_resolves_without_the_tested_set(tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("torch==2.11.*\n")
    assert "torch==2.11." in _resolve("3.12", constraints, "cli", "aoti")


def _resolve(version: str, constraints: Path, *extras: str) -> str:
    """Resolve what pip would install on Linux from wheels only; skip the test if no index can be reached."""
    command = ["uv", "pip", "compile", "pyproject.toml", "--quiet", "--no-header", "--constraints", str(constraints)]
    command += ["--python-version", version, "--python-platform", "x86_64-manylinux_2_28", "--only-binary", ":all:"]
    command += [word for name in SOURCE_ONLY for word in ("--no-binary", name)]
    command += [word for extra in extras for word in ("--extra", extra)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode and UNREACHABLE.search(ran.stderr):
        pytest.skip(f"no package index can be reached: {ran.stderr.strip().splitlines()[0]}")
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_tested_set_meets_the_stated_ranges(project: dict[str, Any]) -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    extras = project["project"]["optional-dependencies"]
    stated = [*project["project"]["dependencies"], *extras["cli"], *extras["dev"]]
    for requirement in stated:
        name, _, least = requirement.partition(">=")
        if name.startswith("tgate_compile"):
            continue
        assert _version(pinned[name]) >= _version(least), requirement


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def test_the_version_has_a_line_in_the_changelog() -> None:
    assert tgate_compile.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_the_commands_of_the_readme_and_of_ci_are_the_same() -> None:
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    for command in ("-c constraints.txt -e '.[dev]'", "python -m pytest -n 2"):
        assert command in readme
        assert command in ci
