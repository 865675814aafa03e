"""Run the command line: `python -m tgate_compile` is the same as `tgate-compile`."""

from tgate_compile._cli import main

if __name__ == "__main__":
    main()
