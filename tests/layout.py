"""Measure the layout of the package: `python -m tests.layout` prints the counts, and test_layout.py checks them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"tgate_compile": "tgate_compile", "passes": "tgate_compile.passes", "exports": "tgate_compile.exports"}

#: Files that mark a package are not counted as short modules: some have only a docstring.
MARKERS = ("__init__.py", "__main__.py")


@dataclass(frozen=True)
class Layout:
    """The counts.

    Attributes:
        modules: all modules.
        short: modules of fewer than 40 lines, except packages' `__init__.py`.
        long: modules of more than 500 lines.
        crowded: folders of more than 20 files.
        floors: the number of layers of the import contract.
        circles: modules that import each other when they are loaded, directly or through others.
    """

    modules: int
    short: list[str]
    long: list[str]
    crowded: list[str]
    floors: int
    circles: list[list[str]]


def measure() -> Layout:
    """Count the modules in the tree."""
    files = dict(_files())
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in files.items()}
    sizes: dict[Path, int] = {}
    for path in files.values():
        sizes[path.parent] = sizes.get(path.parent, 0) + 1
    return Layout(
        modules=len(files),
        short=sorted(name for name, count in lines.items() if count < 40 and files[name].name not in MARKERS),
        long=sorted(name for name, count in lines.items() if count > 500),
        crowded=sorted(str(folder.relative_to(ROOT)) for folder, count in sizes.items() if count > 20),
        floors=_floors(),
        circles=_circles({name: set(_imports(path, files)) for name, path in files.items()}),
    )


def _files() -> Iterator[tuple[str, Path]]:
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "tgate_compile" and parts[0] in ("passes", "exports"):  # links to the folders beside it
                continue
            yield ".".join((package, *(part for part in parts if part != "__init__"))), path


def _imports(path: Path, files: Mapping[str, Path]) -> Iterator[str]:
    """Return the modules that a module imports when it is loaded: not in functions, not for type checkers."""
    statements: list[ast.stmt] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while statements:
        statement = statements.pop()
        if isinstance(statement, ast.ImportFrom) and statement.module is not None:
            for alias in statement.names:
                whole = f"{statement.module}.{alias.name}"
                yield from (name for name in (whole, statement.module) if name in files)
        elif isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names if alias.name in files)
        elif isinstance(statement, (ast.Try, ast.ClassDef, ast.With)):
            statements.extend(statement.body)
        elif isinstance(statement, ast.If) and "TYPE_CHECKING" not in ast.unparse(statement.test):
            statements.extend([*statement.body, *statement.orelse])


def _circles(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """Return groups of modules in which each module can be reached from every other one."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            for name in imports[waiting.pop()] - found:
                found.add(name)
                waiting.append(name)
        return found

    # A package that re-exports names from its own modules is not circular.
    reach = {name: reached(name) for name in imports}
    groups = {
        tuple(sorted(other for other in imports if other in reach[name] and name in reach[other])) for name in reach
    }
    return sorted(list(group) for group in groups if len(group) > 1)


def _floors() -> int:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    layers = text.partition("layers = [")[2].partition("]")[0]
    return sum(line.strip().startswith('"') for line in layers.splitlines())


if __name__ == "__main__":
    layout = measure()
    sys.stdout.write(
        f"{layout.modules} modules, {len(layout.short)} under 40 lines, {len(layout.long)} over 500, "
        f"{len(layout.crowded)} folders of more than 20 files, {layout.floors} floors, {len(layout.circles)} circles\n"
    )
    for title in ("short", "long", "crowded", "circles"):
        for entry in getattr(layout, title):
            sys.stdout.write(f"  {title}: {entry}\n")
