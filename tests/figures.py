"""Figures in Markdown, and the result files that they come from.

Comments, which readers do not see, say where figures come from. Before a table:

    <!-- figures: benchmarks/results/quality_embedded.json
    rows: pick(rows, "plain; steps 20")
    columns: macs | 100 * pair.accuracy.all, 100 * pair.accuracy_minus_plain_se
    -->

`rows` is a Python expression over the file's content that gives a record for each of the table's rows. Each of the
`columns` after the first one is an expression over a record's content, `row`, the record itself, and `file`, the whole;
a column of several figures has as many, with commas, and one that is not checked has none. In the place of both,
`cells:` has an expression for each of the figures, in the order of reading. After figures in a text:

    exported in 1.43 times<!-- figures: benchmarks/results/export_sdxl.json: peak_over_weights --> its weights

which is about the last figures before it, as many as there are expressions, with bars in between; `None` is not
checked, and a starred expression is about several. Figures that a test has in itself name it,
`<!-- figures: by tests/test_cost.py -->`, and so do the places in `docs/findings.md`, `<!-- findings: gates -->`, which
`tests/test_findings.py` compares.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

ROOT = Path(__file__).parents[1]
BY_PROGRAM = ("by ", "findings: ")
MINUS = "\u2212"

_COMMENT = re.compile(r"<!-- (?:figures: |(?=findings: ))(.*?)\s*-->", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])[\u2212+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[+-]?\d+)?")
_TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
_MEASURED_CELL = re.compile(r"[\u2212+]?[\d,]*\d\.\d")


@dataclass(frozen=True)
class Figures:
    """A comment, and what it is about.

    Attributes:
        about: its words.
        text: the Markdown before it, since the last one.
        table: the table that begins right after it, or nothing.
        line: where it is.
    """

    about: str
    text: str
    table: str
    line: int


@dataclass(frozen=True)
class Figure:
    """What is printed, and what should be."""

    printed: str
    expected: float | None
    what: str

    @property
    def agrees(self) -> bool:
        """Whether it is the expected value, rounded to the digits that are printed."""
        if self.expected is None:
            return True
        number, _, exponent = self.printed.replace(MINUS, "-").replace(",", "").partition("e")
        unit = 10.0 ** (int(exponent or 0) - len(number.partition(".")[2]))
        value = float(number) * 10.0 ** int(exponent or 0)
        return abs(value - float(self.expected)) <= unit / 2 + 1e-9 * abs(value)


class Record:
    """A JSON object, whose keys are attributes."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data

    def __getattr__(self, name: str) -> Any:
        try:
            return _wrapped(self.data[name])
        except KeyError:
            raise AttributeError(f"no {name!r} among {list(self.data)}") from None

    def __getitem__(self, name: str) -> Any:
        return _wrapped(self.data[name])

    def values(self) -> list[Any]:
        return [_wrapped(value) for value in self.data.values()]


def _wrapped(value: Any) -> Any:
    if isinstance(value, dict):
        return Record(value)
    return [_wrapped(item) for item in value] if isinstance(value, list) else value


def pick(rows: Record | list[Any], names: str) -> list[Any]:
    """The rows of these names, or those whose texts are these: `"plain; steps 20"`."""
    return [_row(rows, name.strip()) for name in names.split(";")]


def _row(rows: Record | list[Any], name: str) -> Any:
    if isinstance(rows, Record):
        return rows[name]
    (found,) = (row for row in rows if name in (row.data.get(key) for key in ("title", "contender", "label")))
    return found


@cache
def read(path: str) -> Any:
    """A file's content, an object or a list."""
    return _wrapped(json.loads((ROOT / path).read_text(encoding="utf-8")))


def gain(before: str, after: str, *files: Any) -> tuple[float, float, int, int]:
    """How many more percent of the same pairs one row gets right than another, with the standard error; won; lost.

    Rows are those of `benchmarks/quality.py`, in all of `files` together.
    """
    rights = ["".join(file.rows[name].pair.right for file in files) for name in (before, after)]
    changes = [int(y) - int(x) for x, y in zip(*rights, strict=True)]
    return (100 * mean(changes), 100 * stdev(changes) / len(changes) ** 0.5, changes.count(1), changes.count(-1))


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (gain, len, list, max, mean, median, min, pick, read, round, sum, zip)
}


def _value(expression: str, content: Any, **names: Any) -> Any:
    """Of an expression over an object's keys. The expressions are ours, in our own documents."""
    keys = {key: content[key] for key in content.data if key.isidentifier()} if isinstance(content, Record) else {}
    return eval(expression, {"__builtins__": {}, **_FUNCTIONS, **keys, **names})


def comments(markdown: str) -> Iterator[Figures]:
    """All of a page, in order."""
    before = 0
    for comment in _COMMENT.finditer(markdown):
        table = _TABLE.match(markdown[comment.end() :].lstrip("\n"))
        yield Figures(
            comment[1],
            markdown[before : comment.start()],
            table[0] if table else "",
            markdown.count("\n", 0, comment.start()) + 1,
        )
        before = comment.end()


def tables(markdown: str) -> Iterator[tuple[int, str]]:
    """Line and text of each table in which at least two cells begin with a decimal figure."""
    for table in _TABLE.finditer(markdown):
        measured = [cell for row in _cells(table[0]) for cell in row if _MEASURED_CELL.match(cell)]
        if len(measured) > 1:
            yield markdown.count("\n", 0, table.start()) + 1, table[0]


def _cells(table: str) -> list[list[str]]:
    """A table's rows without its heading, without their first cells."""
    return [[cell.strip() for cell in line.strip()[1:-1].split("|")][1:] for line in table.splitlines()[2:]]


def figures(comment: Figures) -> Iterator[Figure]:
    """All that a comment says; of one with a file.

    Raises:
        ValueError: it names no file, or there are other numbers of rows or figures than it says.
    """
    said = re.fullmatch(r"(\S+\.json)(:?)\s+(.*)", comment.about, re.DOTALL)
    if said is None:
        raise ValueError(f"this names no result file: {comment.about}")
    path, of_text, rest = said.groups()
    content = read(path)
    if of_text:
        values = _values(rest, content)
        yield from _paired(_NUMBER.findall(comment.text)[-len(values) :], values, comment.text.strip()[-40:])
        return
    fields = dict(re.findall(r"^(rows|columns|cells): (.*?)(?=\n\w+: |\Z)", rest, re.MULTILINE | re.DOTALL))
    if "cells" in fields:
        printed = [number for row in _cells(comment.table) for cell in row for number in _NUMBER.findall(cell)]
        yield from _paired(printed, _values(fields["cells"], content), "cells")
    else:
        yield from _of_rows(comment.table, content, fields)


def _of_rows(table: str, content: Any, fields: dict[str, str]) -> Iterator[Figure]:
    records = _value(" ".join(fields["rows"].split()), content, file=content)
    columns = _split(fields["columns"])
    rows = _cells(table)
    if len(rows) != len(records) or any(len(row) != len(columns) for row in rows):
        raise ValueError(f"{len(records)} records of {len(columns)} columns for {len(rows)} rows of {len(rows[0])}")
    for number, (row, record) in enumerate(zip(rows, records, strict=True), 1):
        for column, cell in zip(columns, row, strict=True):
            printed = _NUMBER.findall(cell)
            if not printed or not column:
                continue  # what is left out cannot be wrong
            value = _value(column, record, row=record, file=content)
            values = list(value) if isinstance(value, tuple) else [value]
            while len(values) > len(printed) and not values[-1]:
                values.pop()  # no spread is shown where there is none
            yield from _paired(printed, values, f"row {number}, {column}")


def _paired(printed: Iterable[str], values: Iterable[Any], what: str) -> Iterator[Figure]:
    printed, values = list(printed), list(values)
    if len(printed) != len(values):
        raise ValueError(f"{what}: the figures are {printed}, and {len(values)} are said: {values}")
    for number, value in zip(printed, values, strict=True):
        yield Figure(number, value, what)


def _values(expressions: str, content: Any) -> list[Any]:
    """Of expressions with bars in between; a starred one has several."""
    found: list[Any] = []
    for expression in _split(expressions):
        value = _value(expression.removeprefix("*"), content, file=content)
        found += value if expression.startswith("*") else [value]
    return found


def _split(expressions: str) -> list[str]:
    return [" ".join(expression.split()) for expression in expressions.split("|")]
