"""The console script: checks that the packages of the command are installed, then runs the app."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings

#: The modules that the command line needs beyond the dependencies of the library.
NEEDED = ("typer", "rich", "transformers", "PIL")
#: The same for `run`, and for `web` and `serve` with a bundle, which run without torch.
NEEDED_TO_RUN = ("typer", "rich", "PIL")

MSG_MISSING = (
    "tgate-compile needs packages that are not installed: {missing}. Install them with\n"
    "  pip install 'tgate_compile[cli]'\n"
)


def main() -> None:
    """Run the command line with the process's arguments."""
    needed = NEEDED_TO_RUN if _command() in ("run", "web", "serve") else NEEDED
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(MSG_MISSING.format(missing=", ".join(missing)))
        sys.exit(1)
    if not sys.warnoptions:
        # Users of the command line cannot act on deprecation warnings that one dependency causes in another.
        warnings.simplefilter("ignore")
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # they log advice when they are imported
        os.environ.setdefault(f"{library}_VERBOSITY", "error")

    from tgate_compile._cli.app import app

    app()


def _command() -> str | None:
    """Return the first argument that is not an option; options before a command take no values."""
    return next((argument for argument in sys.argv[1:] if not argument.startswith("-")), None)
