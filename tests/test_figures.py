"""Figures in README, CHANGELOG and docs agree with the result files that they come from; see `tests/figures.py`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.figures import BY_PROGRAM, MINUS, ROOT, Figure, Figures, comments, figures, tables

PAGES = sorted(
    [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")]
)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_figures_agree_with_their_files(page: Path) -> None:
    wrong = []
    for comment in comments(page.read_text(encoding="utf-8")):
        if comment.about.startswith(BY_PROGRAM):
            continue
        try:
            found = list(figures(comment))
        except Exception as error:
            raise AssertionError(f"{name(page)}, line {comment.line}: {type(error).__name__}: {error}") from error
        assert found, f"{name(page)}, line {comment.line}: no figures"
        wrong += [(comment.line, f.printed, f.expected, f.what) for f in found if not f.agrees]
    assert not wrong, "\n".join(f"line {line}: {printed}, but {value}: {what}" for line, printed, value, what in wrong)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_table_of_figures_says_where_they_come_from(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    said = {comment.table for comment in comments(text)}
    silent = [line for line, table in tables(text) if table not in said]
    assert not silent, f"{name(page)}: tables without a comment in lines {silent}; see tests/figures.py"


def test_results_name_no_folder_of_a_machine() -> None:
    """Whoever runs the command again has others."""
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
    page = (
        "| | macs |\n| --- | ---: |\n| a | 0.69 |\n",
        '<!-- figures: benchmarks/results/quality_embedded.json\nrows: pick(rows, "tgate 10")\ncolumns: macs\n-->\n\n',
    )
    (wrong,) = comments(page[1] + page[0])
    assert [f.agrees for f in figures(wrong)] == [False]
    (right,) = comments(page[1] + page[0].replace("0.69", "0.68"))
    assert [f.agrees for f in figures(right)] == [True]
    with pytest.raises(ValueError, match="1 records"):
        list(figures(Figures(right.about, "", page[0] + "| b | 0.7 |\n", 1)))
    with pytest.raises(ValueError, match="no result file: not kept"):
        list(figures(Figures("not kept", "", page[0], 1)))


def test_a_table_is_measured_if_it_has_decimal_figures() -> None:
    measured = "| | s |\n| --- | --- |\n| a | 0.6 |\n| b | 1.25x |\n"
    plain = "| | what |\n| --- | --- |\n| a | version 1.7 |\n| b | 3 |\n"
    assert [table for _, table in tables(f"{measured}\n{plain}\n{measured}")] == [measured, measured]
