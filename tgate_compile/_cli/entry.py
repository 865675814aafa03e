"""The console script: says what to install where something is missing, then hands over to the app."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings

#: What the command line needs beyond the library: the module, and the distribution if it is called otherwise.
NEEDED = ("typer", "rich", "transformers", "PIL")

MSG_MISSING = (
    "tgate-compile needs {missing}, which the library itself does not. Install the command line's packages with\n"
    "  pip install 'tgate_compile[cli]'\n"
)


def main() -> None:
    """Run the command line with the process's arguments."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(MSG_MISSING.format(missing=", ".join(missing)))
        sys.exit(1)
    if not sys.warnoptions:
        # Deprecations between the libraries underneath are nothing that a user of the command line can act on.
        warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it gives advice while it is imported

    from tgate_compile._cli.app import app

    app()
