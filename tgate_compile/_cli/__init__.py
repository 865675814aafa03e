"""The command line, `tgate-compile`."""

from tgate_compile._cli.app import main as main
