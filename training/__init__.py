"""Train the embedded models of `tgate_compile._demo`. This is not part of the installed package."""
