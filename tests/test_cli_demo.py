"""`tgate-compile demo`: a picture and measured figures from the embedded pipeline."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tgate_compile._cli.app import app
from tgate_compile._cli.demo import guidance_sentence, sentences
from tgate_compile._cli.demo_runs import (
    GAP,
    MAX_ROWS,
    TILE,
    Mode,
    Results,
    Row,
    Task,
    draw_picture,
    make_modes,
    measure,
    psnr,
    saving_by_guidance,
)
from tgate_compile._cli.loading import CHOSEN, demo_prompts
from tgate_compile._demo.captions import is_held_out, parse_caption
from tgate_compile._runtimes import automatic_backends

# diffusers 0.42 converts a tensor to an array in a way that is deprecated in numpy 2.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]

STEPS, GATE, PROMPTS = 4, 2, 2


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Run a short demo; return its folder and the JSON that it printed."""
    out = tmp_path_factory.mktemp("demo") / "new"
    arguments = ["demo", "--out", str(out), "--json"]
    arguments += ["--steps", str(STEPS), "--gate-step", str(GATE), "--count", str(PROMPTS)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


@pytest.mark.heavy
def test_the_file_holds_what_was_printed(ran: tuple[Path, dict[str, Any]]) -> None:
    out, printed = ran
    assert json.loads((out / "demo.json").read_text(encoding="utf-8")) == printed
    assert printed["strip"] == "FFpp"
    assert printed["task"]["prompts"] == list(CHOSEN[:PROMPTS])
    assert printed["machine"]["torch"] == torch.__version__


@pytest.mark.heavy
def test_the_rows_are_comparable(ran: tuple[Path, dict[str, Any]]) -> None:
    rows = {row["key"]: row for row in ran[1]["rows"]}
    fastest = automatic_backends("cpu")[0]
    assert list(rows) == list(dict.fromkeys(["plain", "guidance_dropped", "eager", fastest]))
    plain, dropped, eager = list(rows.values())[:3]
    for row in rows.values():
        assert len(row["all_seconds"]) == len(row["right"]) == len(row["psnrs"]) == PROMPTS
        assert row["speedup"] == pytest.approx(plain["seconds"] / row["seconds"])
        assert 0 <= row["accuracy"]["all"] <= 1
    full = plain["macs"] // STEPS
    assert dropped["macs"] == full * GATE + full // 2 * (STEPS - GATE)
    assert eager["macs"] < dropped["macs"] < plain["macs"]
    assert eager["parameters_gated"] < eager["parameters"] == dropped["parameters_gated"] == plain["parameters_gated"]
    assert eager["cache_bytes"] > 0 == plain["cache_bytes"]
    assert plain["psnrs"] == [None] * PROMPTS
    assert all(value > 10 for row in (dropped, eager) for value in row["psnrs"])


@pytest.mark.heavy
def test_the_picture_has_a_row_per_prompt(ran: tuple[Path, dict[str, Any]]) -> None:
    with Image.open(ran[0] / "demo.png") as picture:
        assert picture.mode == "RGB"
        assert picture.width > 3 * TILE
        assert picture.height > PROMPTS * TILE
        assert len(picture.getcolors(2**24) or ()) > 100


def test_an_unwritable_folder_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "file")])
    assert result.exit_code == 1
    assert "Cannot write to the folder" in result.stderr


def test_prompts_are_held_out_and_always_the_same() -> None:
    prompts = demo_prompts(40)
    assert prompts[: len(CHOSEN)] == list(CHOSEN)
    assert len(set(prompts)) == 40
    assert prompts == demo_prompts(40)
    assert demo_prompts(3) == list(CHOSEN[:3])
    scenes = [parse_caption(prompt) for prompt in prompts]
    assert all(is_held_out(scene) for scene in scenes)
    assert {len(scene.objects) for scene in scenes[:3]} == {1, 2}


def test_guidance_is_dropped_at_the_gate_and_the_cond_half_goes_on() -> None:
    task = Task(tuple(demo_prompts(1)), 4, 5.0, 3, 0)
    mode = next(mode for mode in make_modes(task.gate, []) if mode.key == "guidance_dropped")
    seen: list[torch.Tensor] = []

    def look(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["encoder_hidden_states"])

    handle = mode.pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
    measure(mode, task, 0)
    handle.remove()
    assert [len(text) for text in seen] == [2, 2, 2, 1]
    assert torch.equal(seen[3][0], seen[0][1])


def test_psnr() -> None:
    black, grey = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (51, 51, 51))
    assert psnr(black, black) is None
    assert psnr(black, grey) == pytest.approx(13.979, abs=1e-3)  # 20 log10(255 / 51)


def row(key: str, seconds: float, macs: int, cache: int = 0) -> Row:
    right, psnrs = (True,) * 20, (30.0,) * 20
    return Row(key, key, seconds, (seconds,) * 20, 1.0, 2.5, macs, 100, 90, cache, right, {"all": 1.0}, psnrs)


RESULTS = Results(
    Task(tuple(demo_prompts(20)), 25, 5.0, 10, 0),
    (row("plain", 4.0, 100), row("guidance_dropped", 3.1, 70), row("eager", 3.0, 60, cache=5)),
    "F" * 10 + "p" * 15,
)


def test_the_share_of_the_guidance_drop_is_printed() -> None:
    assert saving_by_guidance(RESULTS.rows) == pytest.approx(0.9)
    assert "90% of the time" in guidance_sentence(RESULTS)
    assert "75% of the MACs" in guidance_sentence(RESULTS)
    assert any("eager 2.5 s" in line for line in sentences(RESULTS))


def test_a_busy_machine_is_reported() -> None:
    plain, dropped, eager = RESULTS.rows
    slower = replace(RESULTS, rows=(plain, dropped, replace(eager, seconds=5.0)))
    assert saving_by_guidance(slower.rows) is None
    hardly = replace(RESULTS, rows=(plain, dropped, replace(eager, seconds=3.95)))
    assert saving_by_guidance(hardly.rows) is None
    assert "saved no time here" in guidance_sentence(slower)
    never = replace(RESULTS, rows=(plain, dropped, replace(eager, cache_bytes=0)))
    assert guidance_sentence(never) == "Nothing was gated, so nothing is saved."


def test_a_picture_of_many_prompts_stays_in_bounds() -> None:
    images = [Image.new("RGB", (64, 64), (index, 0, 0)) for index in range(20)]
    plain, gated = (Mode(key, key, None, images=images) for key in ("plain", "eager"))  # type: ignore[arg-type]
    picture = draw_picture(RESULTS, plain, gated)
    assert picture.height < (MAX_ROWS + 2) * (TILE + GAP)
