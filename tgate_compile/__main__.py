"""`python -m tgate_compile`: the same as `tgate-compile`."""

from tgate_compile._cli import main

if __name__ == "__main__":
    main()
