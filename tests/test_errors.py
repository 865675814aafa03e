"""Errors of other packages are shortened to one line for our messages."""

from __future__ import annotations

import pytest

from tgate_compile._errors import first_line


@pytest.mark.parametrize(
    ("text", "line", "named"),
    [
        ("It failed.\nat line 3", "It failed", "RuntimeError: It failed"),
        (
            "\n\n  indented, after empty lines\n",
            "indented, after empty lines",
            "RuntimeError: indented, after empty lines",
        ),
        ("", "RuntimeError", "RuntimeError"),
    ],
)
def test_first_line(text: str, line: str, named: str) -> None:
    error = RuntimeError(text)
    assert first_line(error) == line
    assert first_line(error, named=True) == named
