"""Draws docs/strips.png: python docs/strips.py"""

from __future__ import annotations

from pathlib import Path

from tgate_compile.methods.pab import PAB
from tgate_compile.methods.schedule import Schedule
from tgate_compile.study.figures import strip_picture

STEPS = 25
ROWS: dict[str, Schedule | str] = {
    "plain": "F" * STEPS,
    "fewer steps (17)": "F" * 17,
    "guidance drop, step 10": Schedule(None, guidance_step=10),
    "T-GATE v1, gate 10": Schedule(10),
    "T-GATE v2, gate 10, sp interval 5": Schedule(10, sp_interval=5),
    "DeepCache, interval 3": Schedule(None, deepcache_interval=3),
    "DeepCache 3 + T-GATE, gate 10": Schedule(10, deepcache_interval=3),
    "PAB 6, 2": Schedule.of(PAB(6, 2)),
    "PAB 6, 2 + T-GATE, gate 10": PAB(6, 2) + Schedule(10),
}

if __name__ == "__main__":
    strip_picture(ROWS, Path(__file__).with_name("strips.png"), num_steps=STEPS)
