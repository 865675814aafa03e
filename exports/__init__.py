"""Runtimes: one folder each, with how a graph is converted, run live, quantized, saved and opened.

To add a runtime, add a folder. Its `__init__.py` describes it with a `BackendEntry`, a `FormatEntry` or both (see
`tgate_compile/_runtimes.py`); nothing else has to change.
"""
