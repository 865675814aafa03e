"""The package layout stays easy to navigate."""

from __future__ import annotations

from tests.layout import measure


def test_the_layout() -> None:
    layout = measure()
    assert layout.modules <= 198
    assert len(layout.short) <= 12
    assert layout.long == []
    assert layout.crowded == []
    assert layout.floors <= 10
    assert layout.circles == []
