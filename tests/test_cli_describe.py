"""`tgate-compile describe`: the library's description, with the work of a whole image; `tgate-compile cache`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import HeunDiscreteScheduler, PNDMScheduler
from typer.testing import CliRunner

from tgate_compile._cache import FOLDER_VARIABLE, DiskCache
from tgate_compile._cli.app import app
from tgate_compile._cli.console import planned_calls

# diffusers 0.42 converts a tensor to an array in a way that is deprecated in numpy 2.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]

run = CliRunner().invoke


def test_json_has_the_description_and_the_plan() -> None:
    result = run(app, ["describe", "--steps", "20", "--gate-step", "0.25", "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert (data["model"], data["denoiser"], len(data["sites"])) == ("embedded", "UNet2DConditionModel", 10)
    full, pruned = data["variants"]
    assert (full["name"], full["batch"]) == ("full", 2)
    assert (pruned["name"], pruned["batch"]) == ("pruned", 1)
    plan = data["plan"]
    assert (plan["gate"], plan["strip"]) == (5, "F" * 5 + "p" * 15)
    assert plan["macs_plain"] == 20 * full["macs"]
    assert plan["macs_guidance_dropped"] == 5 * full["macs"] + 15 * full["macs"] // 2
    assert plan["macs_gated"] == 5 * full["macs"] + 15 * pruned["macs"]
    # The two steps of the capture do not count.
    assert "strip" not in data


def test_any_schedule() -> None:
    result = run(app, ["describe", "--steps", "6", "--deepcache-interval", "3", "--gate-step", "4", "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    macs = {(graph["name"], graph["batch"]): graph["macs"] for graph in data["variants"]}
    plan = data["plan"]
    assert plan["strip"] == "FDDFpr"
    used = [("full", 2), ("shallow", 2), ("shallow", 2), ("full", 2), ("pruned", 1), ("pruned, shallow", 1)]
    assert plan["macs_gated"] == sum(macs[graph] for graph in used)


def test_the_table_is_for_people() -> None:
    result = run(app, ["describe", "--scheduler", "heun", "--steps", "4", "--gate-step", "1", "--guidance", "1"])
    assert result.exit_code == 0, result.output
    for shown in ("10 cross-attention sites", "mid_block", "down_blocks.2", "1x4x16x16", "fppp", "1 full, 3 pruned"):
        assert shown in result.stdout


def test_calls_are_counted_and_not_steps() -> None:
    # Heun: two calls per step, one for the last.
    assert planned_calls(HeunDiscreteScheduler(), "FFpp", 4) == "FFFF" + "ppp"
    # PNDM: its second call repeats the first timestep and does not count as a step.
    assert planned_calls(PNDMScheduler(skip_prk_steps=True), "FFpp", 4) == "FFF" + "pp"


def test_cache_lists_what_is_kept_and_clears_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    kept = DiskCache(tmp_path)
    for number in range(3):
        kept.write(f"{number:064x}", bytes(50_000), kind="graph" if number else "onnx", label="UNet2DConditionModel")
    result = run(app, ["cache"])
    assert result.exit_code == 0, result.output
    assert "0.2 MB of at most 2000 MB" in result.stdout.replace("\n", " ")
    rows = [line.split() for line in result.stdout.splitlines() if "UNet2DConditionModel" in line]
    assert sorted(row[-4:-2] for row in rows) == [["1", "0.05"], ["2", "0.10"]]
    data = json.loads(run(app, ["cache", "--json"]).stdout)
    assert (data["folder"], len(data["entries"]), data["limit"]) == (str(tmp_path), 3, 2 * 10**9)
    result = run(app, ["cache", "--clear"])
    assert result.stdout.startswith("deleted 3 entries")
    assert not list(kept.entries())
    monkeypatch.setenv(FOLDER_VARIABLE, "off")
    assert "switched off" in run(app, ["cache"]).stdout
