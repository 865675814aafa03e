"""Figures in README, CHANGELOG and docs agree with their result files; see `tests/figures.py`."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.figures import MINUS, ROOT, Figure, Mark, entries, figures, marks, tables

PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
        *(page for folder in ("benchmarks", "docs", "examples", "training") for page in (ROOT / folder).rglob("*.md")),
    ]
)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_figures_agree_with_their_files(page: Path) -> None:
    wrong = []
    for mark in marks(page.read_text(encoding="utf-8")):
        entry = entries().get(mark.name, {})
        if not mark.name or "by" in entry:
            continue
        try:
            found = list(figures(mark, entry))
        except Exception as error:
            raise AssertionError(
                f"{name(page)}, line {mark.line}, {mark.name}: {type(error).__name__}: {error}"
            ) from error
        assert found, f"{name(page)}, line {mark.line}: no figures"
        wrong += [(mark.line, f.printed, f.expected, f.what) for f in found if not f.agrees]
    assert not wrong, "\n".join(f"line {line}: {printed}, but {value}: {what}" for line, printed, value, what in wrong)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_table_of_figures_has_a_mark(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    marked = {mark.table for mark in marks(text)}
    unmarked = [line for line, table in tables(text) if table not in marked]
    assert not unmarked, f"{name(page)}: tables without a mark in lines {unmarked}; see tests/figures.py"


def test_each_entry_of_the_sidecar_has_one_mark() -> None:
    found = Counter(mark.name for page in PAGES for mark in marks(page.read_text(encoding="utf-8")) if mark.name)
    assert found == Counter(list(entries()))


def test_no_page_contains_expressions() -> None:
    assert [name(page) for page in PAGES if "<!-- figures:" in page.read_text(encoding="utf-8")] == []


def test_figures_of_other_tests_name_a_test_that_exists() -> None:
    named = [entry["by"] for entry in entries().values() if "by" in entry]
    assert named
    assert all((ROOT / path).is_file() for path in named)


def test_results_do_not_name_folders_of_a_machine() -> None:
    results = [*(ROOT / "benchmarks" / "results").glob("*.json"), *(ROOT / "docs" / "results").glob("*.json")]
    assert len(results) > 20
    assert [name(path) for path in results if re.search(r'[ "=]/\w', path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("printed", "value", "agrees"),
    [
        ("1.43", 1.4331, True),
        ("1.43", 1.4351, False),
        ("1,317", 1316.6, True),
        (f"{MINUS}0.02", -0.0151, True),
        ("0.02", -0.0151, False),
        ("4e-3", 0.00445, True),
        ("4e-3", 0.0046, False),
        ("18", 17.4, False),
    ],
)
def test_figures_agree_if_they_are_rounded(printed: str, value: float, agrees: bool) -> None:
    assert Figure(printed, value, "").agrees is agrees


def test_a_wrong_figure_is_found() -> None:
    table = "| | macs |\n| --- | ---: |\n| a | 0.69 |\n"
    entry = {
        "file": "benchmarks/results/quality_embedded.json",
        "rows": 'pick(rows, "tgate 10")',
        "columns": ["macs"],
    }
    (wrong,) = marks(f"<!-- fig: some-name -->\n\n{table}")
    assert wrong.name == "some-name"
    assert [f.agrees for f in figures(wrong, entry)] == [False]
    (right,) = marks("<!-- fig: some-name -->\n\n" + table.replace("0.69", "0.68"))
    assert [f.agrees for f in figures(right, entry)] == [True]
    with pytest.raises(ValueError, match="1 records"):
        list(figures(Mark("", "", table + "| b | 0.7 |\n", 1), entry))
    with pytest.raises(ValueError, match="an entry has a `file`"):
        list(figures(wrong, {}))
    (in_text,) = marks("0.69 of 1<!-- fig: some-name -->")
    in_text_entry = {"file": entry["file"], "figures": ['rows["tgate 10"].macs', ""]}
    assert [f.agrees for f in figures(in_text, in_text_entry)] == [False, True]
    (short,) = marks("0.69<!-- fig: some-name -->")
    with pytest.raises(ValueError, match="gives 2 values"):
        list(figures(short, in_text_entry))


def test_a_table_is_measured_if_it_has_decimal_figures() -> None:
    measured = "| | s |\n| --- | --- |\n| a | 0.6 |\n| b | 1.25x |\n"
    plain = "| | what |\n| --- | --- |\n| a | version 1.7 |\n| b | 3 |\n"
    assert [table for _, table in tables(f"{measured}\n{plain}\n{measured}")] == [measured, measured]
