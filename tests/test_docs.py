"""The pages' links resolve, their commands use existing options, and the notebook runs."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

pytest.importorskip("typer")

import typer

import tgate_compile
from tests.comparing import assert_differ
from tests.figures import ROOT
from tests.tiny_pipelines import run, stable_diffusion
from tgate_compile import Schedule, TGate
from tgate_compile._cli.app import app
from tgate_compile.methods.method import (
    BLOCKS,
    CROSS,
    DEEP,
    ESTIMATED,
    FF,
    GRAPH_NAMES,
    REAR,
    REFERENCE,
    SELF,
    TEMPORAL,
    Kind,
    Phase,
)

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(page for folder in ("benchmarks", "docs", "examples", "training") for page in (ROOT / folder).rglob("*.md")),
    ]
)
NOTEBOOK = ROOT / "docs" / "guides" / "quickstart.ipynb"

_FENCE = re.compile(r"^ *```([^\n`]*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_INLINE_COMMAND = re.compile(r"`(tgate-compile [^`]+)`")
_HEADING = re.compile(r"^#+ +(.*?)\s*$", re.MULTILINE)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def without_code(markdown: str) -> str:
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", markdown))


def anchors(markdown: str) -> set[str]:
    """Return the ids of a page's headings, as Python-Markdown makes them."""
    found = set()
    for heading in _HEADING.findall(_FENCE.sub("", markdown)):
        text = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
        found.add(re.sub(r"[-\s]+", "-", text))
    return found


def commands(markdown: str) -> Iterator[list[str]]:
    """Return the arguments of every `tgate-compile` in a page, in code blocks and text."""
    lines = [
        line.strip()
        for language, code in _FENCE.findall(markdown)
        if language in ("bash", "console")
        for line in code.replace("\\\n", " ").splitlines()
    ]
    for line in [*lines, *(" ".join(inline.split()) for inline in _INLINE_COMMAND.findall(markdown))]:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for separator, words in groupby(lexer, key=lambda word: set(word) <= set("&|;<>")):
            command = list(words)
            if not separator and command[0] == "tgate-compile":
                yield command[1:]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for link in _LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        to_heading = anchor and target.suffix == ".md"
        if not target.exists() or (to_heading and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize(
    "folder", ["benchmarks", "examples", "exports", "passes", "tests", "tgate_compile", "training"]
)
def test_pages_that_the_code_names_exist(folder: str) -> None:
    named = {
        page
        for path in (ROOT / folder).rglob("*.py")
        for page in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text(encoding="utf-8"))
    }
    assert [page for page in sorted(named) if not (ROOT / page).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_have_options_that_exist(page: Path) -> None:
    group: Any = typer.main.get_command(app)
    wrong = []
    for words in commands(page.read_text(encoding="utf-8")):
        given = [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]
        command = group.get_command(None, words[0]) if words and not words[0].startswith("-") else group
        if command is None:
            wrong.append(" ".join(words))
            continue
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        unknown = set(given) - known - {"--help", "-h"}
        if unknown:
            wrong.append(f"{' '.join(words)}: {sorted(unknown)}")
    assert wrong == []


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    page = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^::: tgate_compile\.(\w+)$", page, re.MULTILINE))
    assert set(tgate_compile.__all__) - {"__version__"} <= named


def test_the_letters_of_strips_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "reference" / "schedules.md").read_text(encoding="utf-8")
    words: dict[str, frozenset[Kind]] = {
        "cross": CROSS, "self": SELF, "temporal": TEMPORAL, "deep": DEEP,
        "feed-forward": FF, "range of blocks": BLOCKS, "rear blocks": REAR, "references": REFERENCE,
    }  # fmt: skip
    letters = {}
    for reused, guided, not_guided in re.findall(r"^\| (.+?) \| `([A-Z])` \| `([a-z])` \|", page, re.MULTILINE):
        named = reused.partition(", or ")[0] if "decided" in reused else reused
        reuse = frozenset[Kind]().union(*(kinds for word, kinds in words.items() if word in named))
        decided = BLOCKS if "decided" in reused else frozenset[Kind]()
        phases = [Phase(on, reuse=reuse, decided=decided) for on in (True, False)]
        assert [guided, not_guided] == [phase.character for phase in phases]
        letters[guided] = reuse
    assert f"| | `{ESTIMATED}` | FasterCache |" in page
    assert {*letters, ESTIMATED.upper()} == set(GRAPH_NAMES)


def test_the_method_of_the_guide_works(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "guides" / "adding-a-method.md").read_text(encoding="utf-8")
    (code,) = [code for language, code in _FENCE.findall(page) if "selfreuse.py" in language]
    (tmp_path / "selfreuse.py").write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("selfreuse", tmp_path / "selfreuse.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["selfreuse"] = module  # dataclasses look for the module of their class
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["selfreuse"]
    method = module.SelfReuse(3)
    assert f" {Schedule.of(method).strip(25)} " in page
    pipe = stable_diffusion(layout="small")
    plain = run(pipe, steps=6)
    tgate_compile.optimize(pipe, method + TGate(4), backend="eager")
    assert_differ(run(pipe, steps=6), plain)
    assert tgate_compile.describe(pipe).strip == "FSSFpq"
    assert [str(one) for one in module.SelfReuse.candidates()] == [str(module.SelfReuse(n)) for n in (2, 3)]


def test_commands_of_the_readme_are_found() -> None:
    found = list(commands((ROOT / "README.md").read_text(encoding="utf-8")))
    assert {words[0] for words in found} >= {"demo", "generate", "describe", "tune", "strip", "report", "export", "run"}


def test_readme_commands_use_files_that_earlier_ones_write() -> None:
    """Run from top to bottom, no command reads a missing file or overwrites another command's."""
    written: set[str] = set()
    for words in commands((ROOT / "README.md").read_text(encoding="utf-8")):
        options = dict(pairwise(words))
        if (out := options.get("--out")) is not None:
            assert out not in written, f"two commands write {out}"
        if (schedule := options.get("--schedule")) is not None:
            assert schedule in written, f"{schedule} is read before it is written"
        for bundle in words[1:2] if words[0] in ("run", "inspect") else ():
            assert bundle in written, f"{bundle} is read before it is written"
        written.add(out or "")


def test_git_ignores_what_the_readme_writes() -> None:
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    for words in commands((ROOT / "README.md").read_text(encoding="utf-8")):
        if (out := dict(pairwise(words)).get("--out")) is not None:
            assert any(fnmatch(f"/{out}", pattern.rstrip("/")) for pattern in ignored), out


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_the_notebook_runs(capsys: pytest.CaptureFixture[str]) -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 5
    namespace: dict[str, Any] = {}
    for number, cell in enumerate(code):
        exec(compile(cell, f"cell {number}", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "FFFFFppppppp" in printed
    assert "10 sites" in printed
