"""Prompts of our own, for what is measured on a few generations when no others are given."""

from __future__ import annotations

AUTO_PROMPTS = (
    "a red fox in the snow",
    "a portrait of an old fisherman",
    "a street at night in the rain",
    "a bowl of fruit on a wooden table",
)
