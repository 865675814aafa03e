"""`calibrate_mag_cache`: the ratios that diffusers prints, the same skipped steps, and the files that keep them."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MagCacheConfig
from diffusers.hooks import apply_mag_cache
from typer.testing import CliRunner

import tgate_compile
from tests.comparing import assert_differ, assert_same
from tests.test_faster_cache import STEPS, latents_of, pixart_call
from tests.tiny_joint import JOINT
from tests.tiny_pipelines import pixart, stable_diffusion
from tests.tiny_video import wan, wan_call
from tgate_compile import (
    ConfigurationError,
    MagCache,
    Schedule,
    calibrate_mag_cache,
    load_schedule,
    save_schedule,
    tune,
)
from tgate_compile._cli.app import app

SWEEP = pytest.mark.sweep


def printed_ratios(pipe: Any, call: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> list[list[float]]:
    """Return the ratios that diffusers' own calibration prints: a list, or one for each half with calls of its own."""
    apply_mag_cache(pipe.transformer, MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
    capsys.readouterr()
    latents_of(pipe, call)
    return [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines() if line.startswith("[1.0")]


def joint(name: str) -> tuple[Callable[[], Any], Callable[[], dict[str, Any]]]:
    return JOINT[name].build, lambda: JOINT[name].call(1)


@pytest.mark.parametrize(
    ("build", "call"),
    [
        (pixart, pixart_call),
        pytest.param(wan, wan_call, marks=SWEEP),
        *(
            pytest.param(*joint(name), marks=SWEEP)
            for name in ("FluxPipeline", "StableDiffusion3Pipeline", "QwenImagePipeline")
        ),
    ],
    ids=["pixart", "wan", "flux", "sd3", "qwen_image"],
)
def test_the_ratios_are_those_of_diffusers(
    build: Callable[[], Any], call: Callable[[], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    printed = printed_ratios(build(), call(), capsys)
    assert printed
    # The two halves of Wan and Qwen-Image have separate calls and so separate ratios; a batch of both has their mean.
    expected = [sum(of_step) / len(printed) for of_step in zip(*printed, strict=True)]
    pipe = build()
    plain = latents_of(pipe, call())
    method = calibrate_mag_cache(pipe, call=call(), num_inference_steps=STEPS)
    assert method == MagCache(method.ratios)
    assert method.ratios == pytest.approx(expected, rel=1e-4)
    assert torch.equal(latents_of(pipe, call()), plain)

    # With these ratios both skip the same steps; the threshold is one at which there are some.
    for threshold in (0.03, 0.1, 0.3, 1.0, 3.0):
        method = dataclasses.replace(method, threshold=threshold)
        if "K" in Schedule.of(method).strip(STEPS):
            break
    tgate_compile.optimize(pipe, method, backend="eager")
    images = latents_of(pipe, call())
    assert "K" in tgate_compile.describe(pipe).strip.upper()
    theirs = build()
    config = MagCacheConfig(
        threshold=method.threshold, num_inference_steps=STEPS, mag_ratios=torch.tensor(method.ratios)
    )
    apply_mag_cache(theirs.transformer, config)
    assert_same(images, latents_of(theirs, call()))
    assert_differ(images, plain)


@pytest.mark.heavy
def test_a_calibrated_method_in_a_file(tmp_path: Path) -> None:
    pipe = pixart()
    seen: list[tuple[int, int, str]] = []
    method = calibrate_mag_cache(
        pipe, call=pixart_call(), num_inference_steps=4, seeds=(0, 1), front=1, progress=lambda *at: seen.append(at)
    )
    assert [at[:2] for at in seen] == [(1, 2), (2, 2)]
    assert (len(method.ratios), method.front) == (4, 1)
    alone = [
        calibrate_mag_cache(pipe, call=pixart_call(), num_inference_steps=4, seeds=(seed,), front=1) for seed in (0, 1)
    ]
    assert method.ratios == pytest.approx([sum(r) / 2 for r in zip(*(m.ratios for m in alone), strict=True)])
    loose = dataclasses.replace(method, threshold=9.0)
    save_schedule(Schedule.of(loose), tmp_path / "a.json")
    assert load_schedule(tmp_path / "a.json") == Schedule.of(loose)
    tgate_compile.optimize(pipe, schedule=tmp_path / "a.json", backend="eager")
    latents_of(pipe, pixart_call())
    assert tgate_compile.describe(pipe).strip == "FFKKKFKK"
    assert "ratios of 4 steps" in tgate_compile.describe(pipe).schedule


def test_what_cannot_be_calibrated() -> None:
    with pytest.raises(ConfigurationError, match=r"several denoisers \(transformer, transformer_2\)"):
        calibrate_mag_cache(wan(boundary_ratio=0.5), call=wan_call())
    pipe = tgate_compile.optimize(pixart(), 4, backend="eager")
    with pytest.raises(ConfigurationError, match="already optimized"):
        calibrate_mag_cache(pipe, call=pixart_call())
    with pytest.raises(tgate_compile.UnsupportedModelError, match="is empty"):
        calibrate_mag_cache(stable_diffusion(layout="small"), ["red cat"], front=1, num_inference_steps=2)


@pytest.mark.heavy
def test_tune_calibrates() -> None:
    tuning = tune(pixart(), call=pixart_call(), num_inference_steps=5, tolerance=9.0)
    rows = [row for row in tuning.table if row.family == "MagCache"]
    assert rows
    (ratios,) = {row.schedule.others[0].ratios for row in rows if row.schedule is not None}
    assert len(ratios) == 5
    assert all(row.schedule is not None and row.strip == row.schedule.strip(5) for row in rows)


@pytest.mark.heavy
def test_the_command_line(tmp_path: Path) -> None:
    run = CliRunner().invoke
    path = tmp_path / "magcache.json"
    done = run(
        app, ["tune", "--model", "pixart", "--magcache", "--steps", "4", "--count", "1", "--out", str(path), "--json"]
    )
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert [load_schedule(path)] == [Schedule.of(MagCache(tuple(shown["ratios"])))]
    assert len(shown["ratios"]) == 4
    done = run(app, ["strip", "--schedule", str(path), "--steps", "4"])
    assert shown["strip"] in done.stdout
    done = run(app, ["tune", "--model", "pixart", "--magcache", "--plot", str(tmp_path / "a.png")])
    assert done.exit_code == 2
