"""Runtimes, one folder each: the code that converts, quantizes, saves and opens graphs, and runs them live.

To add a runtime, add a folder whose `__init__.py` describes it with a `BackendEntry`, a `FormatEntry` or both (see
`tgate_compile/_runtimes.py`). No other file has to change.
"""

# The tables import each folder below. If a folder was imported before them, they would miss its entries.
import tgate_compile._runtimes  # noqa: F401
