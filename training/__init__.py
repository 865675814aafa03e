"""Trains the demonstration pipeline of `tgate_compile._demo`. Not part of the installed package."""
