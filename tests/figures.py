"""Compare the figures in Markdown pages with the result files that they come from.

A page marks its figures with `<!-- fig: NAME -->`, right after them in a text, or on a separate line before a table.
`docs/figures.toml` has an entry for each mark: the result file, and how the figures are derived from it; the
comment at its top describes the entries. `docs/evidence/findings.md` also has tables that a program fills in,
`<!-- findings: gates -->`; `tests/test_findings.py` compares them.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

ROOT = Path(__file__).parents[1]
SIDECAR = ROOT / "docs" / "figures.toml"
MINUS = "\u2212"

_MARK = re.compile(r"<!-- (?:fig: ([\w.-]+)|(findings: \w+)) -->")
_NUMBER = re.compile(r"(?<![\w.])[\u2212+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[+-]?\d+)?")
_TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
_MEASURED_CELL = re.compile(r"[\u2212+]?[\d,]*\d\.\d")


Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Mark:
    """A mark in a page, and the figures next to it.

    Attributes:
        name: the name of its entry; empty for a table that a program fills in.
        text: the Markdown between the previous mark and this one.
        table: the table right after it, or empty.
        line: its line in the page.
    """

    name: str
    text: str
    table: str
    line: int


@dataclass(frozen=True)
class Figure:
    """A printed figure, and the value that it should have."""

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
    """A JSON object with its keys as attributes."""

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
    """Return the rows with these names, or those with these texts: `"plain; steps 20"`."""
    return [_row(rows, name.strip()) for name in names.split(";")]


def _row(rows: Record | list[Any], name: str) -> Any:
    if isinstance(rows, Record):
        return rows[name]
    (found,) = (row for row in rows if name in (row.data.get(key) for key in ("title", "contender", "label")))
    return found


@cache
def read(path: str) -> Any:
    """Return a file's content, an object or a list."""
    return _wrapped(json.loads((ROOT / path).read_text(encoding="utf-8")))


def gain(before: str, after: str, *files: Any) -> tuple[float, float, int, int]:
    """Compute how much better one row of `benchmarks/quality.py` is than another, over the pairs of all `files`.

    Returns:
        The difference in percent of the pairs that are right, its standard error, the pairs won, and the pairs lost.
    """
    rights = ["".join(file.rows[name].pair.right for file in files) for name in (before, after)]
    changes = [int(y) - int(x) for x, y in zip(*rights, strict=True)]
    return (100 * mean(changes), 100 * stdev(changes) / len(changes) ** 0.5, changes.count(1), changes.count(-1))


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (gain, len, list, max, mean, median, min, pick, read, round, sum, zip)
}


def _value(expression: str, content: Any, **names: Any) -> Any:
    """Evaluate an expression over an object's keys. Only used for our own sidecar."""
    keys = {key: content[key] for key in content.data if key.isidentifier()} if isinstance(content, Record) else {}
    return eval(" ".join(expression.split()), {"__builtins__": {}, **_FUNCTIONS, **keys, **names})


@cache
def entries() -> Mapping[str, Entry]:
    """Return the sidecar's entries by name."""
    found: dict[str, Entry] = tomllib.loads(SIDECAR.read_text(encoding="utf-8"))
    return found


def marks(markdown: str) -> Iterator[Mark]:
    """Return all marks of a page, in order."""
    before = 0
    for mark in _MARK.finditer(markdown):
        table = _TABLE.match(markdown[mark.end() :].lstrip("\n"))
        yield Mark(
            mark[1] or "",
            markdown[before : mark.start()],
            table[0] if table else "",
            markdown.count("\n", 0, mark.start()) + 1,
        )
        before = mark.end()


def tables(markdown: str) -> Iterator[tuple[int, str]]:
    """Return the line and text of each table in which at least two cells begin with a decimal figure."""
    for table in _TABLE.finditer(markdown):
        measured = [cell for row in _cells(table[0]) for cell in row if _MEASURED_CELL.match(cell)]
        if len(measured) > 1:
            yield markdown.count("\n", 0, table.start()) + 1, table[0]


def _cells(table: str) -> list[list[str]]:
    """Return the rows of a table, without the heading and the first cell of each row."""
    return [[cell.strip() for cell in line.strip()[1:-1].split("|")][1:] for line in table.splitlines()[2:]]


def figures(mark: Mark, entry: Entry) -> Iterator[Figure]:
    """Return the figures beside a mark, with their values computed from the entry's file.

    Raises:
        ValueError: the entry is incomplete, or its numbers of rows or figures differ from the page's.
    """
    ways = {"figures", "cells", "rows"} & entry.keys()
    unknown = entry.keys() - {"file", "figures", "cells", "rows", "columns"}
    if "file" not in entry or len(ways) != 1 or ("rows" in entry) != ("columns" in entry) or unknown:
        raise ValueError(f"an entry has a `file` and either `figures`, `cells`, or `rows` and `columns`: {dict(entry)}")
    content = read(entry["file"])
    if "rows" in entry:
        yield from _of_rows(mark.table, content, entry)
    elif "cells" in entry:
        printed = [number for row in _cells(mark.table) for cell in row for number in _NUMBER.findall(cell)]
        yield from _paired(printed, _values(entry["cells"], content), "cells")
    else:
        values = _values(entry["figures"], content)
        yield from _paired(_NUMBER.findall(mark.text)[-len(values) :], values, mark.text.strip()[-40:])


def _of_rows(table: str, content: Any, entry: Entry) -> Iterator[Figure]:
    records = _value(entry["rows"], content, file=content)
    columns = entry["columns"]
    rows = _cells(table)
    if not rows or len(rows) != len(records) or any(len(row) != len(columns) for row in rows):
        raise ValueError(f"{len(records)} records of {len(columns)} columns, but the table is {rows}")
    for number, (row, record) in enumerate(zip(rows, records, strict=True), 1):
        for column, cell in zip(columns, row, strict=True):
            printed = _NUMBER.findall(cell)
            if not printed or not column:
                continue  # an empty cell cannot be wrong
            value = _value(column, record, row=record, file=content)
            values = list(value) if isinstance(value, tuple) else [value]
            while len(values) > len(printed) and not values[-1]:
                values.pop()  # a spread of zero is not printed
            yield from _paired(printed, values, f"row {number}, {column}")


def _paired(printed: Iterable[str], values: Iterable[Any], what: str) -> Iterator[Figure]:
    printed, values = list(printed), list(values)
    if len(printed) != len(values):
        raise ValueError(f"{what}: the page has {printed}, but the entry gives {len(values)} values: {values}")
    for number, value in zip(printed, values, strict=True):
        yield Figure(number, value, what)


def _values(expressions: Iterable[str], content: Any) -> list[Any]:
    """Evaluate expressions: several values for one that starts with `*`, `None` (not checked) for an empty one."""
    found: list[Any] = []
    for expression in expressions:
        value = _value(expression.removeprefix("*"), content, file=content) if expression else None
        found += value if expression.startswith("*") else [value]
    return found
