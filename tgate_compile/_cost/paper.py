"""The rows of the paper's tables, and the schedule that each one's count means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from tgate_compile._schedule import Schedule

NOTE_BRANCH = (
    "Counted with deepcache_branch=1: the authors used DeepCache's own SDXL pipeline, whose branch 0 computes one "
    "layer more on either side than branch 0 of DeepCacheSDHelper, whose numbering is ours."
)
NOTE_GATE = (
    "Counted with gate_step=13: the authors' code of that time (gate_idx=4) caches the cross-attentions at the "
    "DeepCache update of index 4, step 12, and reuses them from step 13 on. Gate step 10 is their later package's."
)
NOTE_GUIDANCE = "Counted with guidance_step=10 (of 25), which the row itself does not say."

#: The index, from 0, of the DeepCache update at which the authors' first code caches the cross-attentions.
_GATE_INDEX = 4


def paper_tables() -> dict[str, Any]:
    """The paper's tables: their source, convention and geometry, parameters and rows."""
    text = resources.files(__package__).joinpath("paper_tables.json").read_text(encoding="utf-8")
    tables: dict[str, Any] = json.loads(text)
    return tables


def schedule_of(row: Mapping[str, Any]) -> tuple[Schedule | None, tuple[str, ...]]:
    """The schedule whose count is row `row` (None: every step in full), and where it is not what the row says, why.

    Sources: the authors' repository at 133e445^, DeepCache/generate.py and DeepCache/README.md, for both rows with
    DeepCache; DeepCache 0.1.1, sdxl/unet_2d_condition.py and extension/deepcache.py, for the two kinds of branch.
    """
    method = row["method"]
    if method == "none":
        return None, ()
    if method == "tgate":
        intervals = {name: row[name] for name in ("sp_interval", "fi_interval", "warm_up") if name in row}
        return Schedule(row["gate_step"], **intervals), ()
    if method == "adaptive_guidance":
        return Schedule(None, guidance_step=10), (NOTE_GUIDANCE,)
    interval, branch = row["cache_interval"], row["cache_branch_id"] + 1
    if method == "deepcache":
        return Schedule(None, deepcache_interval=interval, deepcache_branch=branch), (NOTE_BRANCH,)
    assert method == "deepcache+tgate", method
    gate = _GATE_INDEX * interval + 1
    return Schedule(gate, deepcache_interval=interval, deepcache_branch=branch), (NOTE_BRANCH, NOTE_GATE)
