"""The command line, `tgate-compile`."""

from tgate_compile._cli.entry import main as main
