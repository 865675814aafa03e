"""Evaluate the quality of images made under schedules."""
