"""Convert without what torch and ExecuTorch say of themselves."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_executorch() -> Iterator[None]:
    """Without deprecations, some of them said once, by the import, and without that an interface may change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
