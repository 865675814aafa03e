"""Benchmark schedules, backends and other packages."""
