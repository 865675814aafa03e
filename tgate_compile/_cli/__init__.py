"""The console script: says what to install where something is missing, then hands over to the app."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings

#: What the command line needs beyond the library: the module, and the distribution if it is called otherwise.
NEEDED = ("typer", "rich", "transformers", "PIL")
#: The same for `run`, and for `web` with a bundle, which do without torch.
NEEDED_TO_RUN = ("typer", "rich", "PIL")

MSG_MISSING = (
    "tgate-compile needs {missing}, which the library itself does not. Install the command line's packages with\n"
    "  pip install 'tgate_compile[cli]'\n"
)


def main() -> None:
    """Run the command line with the process's arguments."""
    needed = NEEDED_TO_RUN if _command() in ("run", "web") else NEEDED
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(MSG_MISSING.format(missing=", ".join(missing)))
        sys.exit(1)
    if not sys.warnoptions:
        # Deprecations between the libraries underneath are nothing that a user of the command line can act on.
        warnings.simplefilter("ignore")
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # they give advice while they are imported
        os.environ.setdefault(f"{library}_VERBOSITY", "error")

    from tgate_compile._cli.app import app

    app()


def _command() -> str | None:
    """The first argument that is no option: those before a command have no values."""
    return next((argument for argument in sys.argv[1:] if not argument.startswith("-")), None)
