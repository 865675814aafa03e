"""Calibration of MagCache, against diffusers, and of TeaCache, against plain hooks; and the files that keep both."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
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
    TeaCache,
    calibrate_mag_cache,
    calibrate_tea_cache,
    load_schedule,
    save_schedule,
    tune,
)
from tgate_compile._cli.app import app
from tgate_compile.methods.decisions import Decider
from tgate_compile.methods.tea_cache import fit_polynomial, skipped_share, threshold_for
from tgate_compile.study.tuning.calibrate import fit_tea_cache
from tgate_compile.study.tuning.request import Runs

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


# TeaCache.


def changes_by_hooks(pipe: Any, call: dict[str, Any]) -> dict[str, list[float]]:
    """Return the changes of the measured values and of the residual, from plain hooks on PixArt's modules."""
    seen: dict[str, list[torch.Tensor]] = {"modulated input": [], "time embedding": [], "enters": [], "leaves": []}
    model = pipe.transformer
    first, last = model.transformer_blocks[0], model.transformer_blocks[-1]
    handles = [
        first.register_forward_pre_hook(lambda module, args: seen["enters"].append(args[0].clone())),
        first.attn1.register_forward_pre_hook(lambda module, args: seen["modulated input"].append(args[0].clone())),
        last.register_forward_hook(lambda module, args, output: seen["leaves"].append(output.clone())),
        model.adaln_single.emb.timestep_embedder.register_forward_hook(
            lambda module, args, output: seen["time embedding"].append(output.clone())
        ),
    ]
    latents_of(pipe, call)
    for handle in handles:
        handle.remove()
    seen["residual"] = [out - into for out, into in zip(seen.pop("leaves"), seen.pop("enters"), strict=True)]
    return {
        name: [float((b - a).abs().mean() / a.abs().mean()) for a, b in pairwise(values)]
        for name, values in seen.items()
    }


def test_teacache_is_fitted_to_the_changes_that_hooks_see(tmp_path: Path) -> None:
    expected = changes_by_hooks(pixart(), pixart_call())
    pipe = pixart()
    plain = latents_of(pipe, pixart_call())
    runs = Runs(None, STEPS, (0,), pixart_call(), "test")
    for measured in ("modulated input", "time embedding"):
        fit = fit_tea_cache(pipe, runs, measured=measured, threshold=0.3)
        (series,) = fit.series
        assert [x for x, _ in series] == pytest.approx(expected[measured], rel=1e-4)
        assert [y for _, y in series] == pytest.approx(expected["residual"], rel=1e-4)
        assert fit.method == TeaCache(0.3, coefficients=fit.method.coefficients, measured=measured)
        points = np.array(series[:-1])
        degree = len(fit.method.coefficients) - 1
        if fit.method.coefficients[-1]:
            assert fit.method.coefficients == pytest.approx(np.polyfit(*points.T, degree), rel=1e-6)
    assert torch.equal(latents_of(pipe, pixart_call()), plain)  # the pipeline is plain again

    # The time embedding does not depend on what was skipped, so the decisions are those that were predicted.
    fit = fit_tea_cache(pipe, runs, measured="time embedding", skip=0.4)
    save_schedule(Schedule.of(fit.method), tmp_path / "a.json")
    assert load_schedule(tmp_path / "a.json") == Schedule.of(fit.method)
    tgate_compile.optimize(pipe, schedule=tmp_path / "a.json", backend="eager")
    assert_differ(latents_of(pipe, pixart_call()), plain)
    decider = Decider(fit.method.rule)
    decided = "".join("K" if decider.skips(x) else "F" for x in expected["time embedding"][:-1])
    strip = tgate_compile.describe(pipe).strip
    assert strip == f"F{decided}F"
    assert strip.count("K") / STEPS == fit.skipped[fit.method.threshold] >= 0.4


def test_the_value_with_the_better_fit_is_measured(caplog: pytest.LogCaptureFixture) -> None:
    """FLUX has two time embeddings, so only the modulated input is measured."""
    build, call = joint("FluxPipeline")
    seen: list[tuple[int, int, str]] = []
    method = calibrate_tea_cache(
        build(), call=call(), num_inference_steps=4, seeds=(0, 1), skip=0.25, progress=lambda *at: seen.append(at)
    )
    assert seen == [(number, 2, "calibration of TeaCache") for number in (1, 2)]
    assert (method.measured, method.model, method.forecast) == ("modulated input", "", 0)
    assert method.coefficients


def test_polynomials() -> None:
    x = np.linspace(0.02, 0.3, 40)

    def groups(y: np.ndarray, noise: float = 0.0) -> list[list[tuple[float, float]]]:
        rng = np.random.default_rng(0)
        noisy = [y + noise * rng.standard_normal(len(y)) for _ in range(4)]
        return [list(zip(x.tolist(), each.tolist(), strict=True)) for each in noisy]

    # A polynomial is found again, with no higher degree than needed.
    for coefficients in [(1.5, 0.0), (1.5, 0.05), (6.0, 0.5, 0.02), (40.0, 2.0, 0.1, 0.01)]:
        fit = fit_polynomial(groups(np.polyval(coefficients, x)))
        assert fit.coefficients == pytest.approx(coefficients, abs=1e-6)
        assert fit.r_squared == pytest.approx(1.0)
    assert len(fit_polynomial(groups(2 * x, noise=0.1)).coefficients) == 2
    # One generation is divided.
    assert fit_polynomial(groups(2 * x + 0.1)[:1]).r_squared == pytest.approx(1.0)
    # The best polynomial would be negative for small changes, decrease for large ones, or decrease everywhere: then
    # blocks would be skipped just where much changes.
    for y in (2 * x - 0.03, 0.3 - 40 * (x - 0.2) ** 2 + 1.5, 0.5 - x):
        fit = fit_polynomial(groups(y))
        values = np.polyval(fit.coefficients, np.linspace(0.0, 3.0, 1000))
        assert (values >= 0.0).all()
        assert (np.diff(values)[10:] >= 0.0).all()
    assert fit.r_squared < 0.0  # the last one cannot be estimated
    for unusable in ([], [[(0.1, 0.1)]], [[(0.0, 0.1), (0.0, 0.2)]], [[(0.1, float("nan")), (0.1, 0.2)]]):
        with pytest.raises(ConfigurationError, match="cannot be fitted to these changes"):
            fit_polynomial(unusable)


def test_thresholds() -> None:
    rng = np.random.default_rng(0)
    series = [[(x, x) for x in rng.uniform(0.05, 0.2, 19).tolist()] for _ in range(3)]
    rule = TeaCache(coefficients=(2.0, 0.0)).rule
    for share in (0.2, 0.5, 0.7, 0.9):
        threshold = threshold_for((2.0, 0.0), series, share)
        assert skipped_share(dataclasses.replace(rule, threshold=threshold), series) >= share
        assert skipped_share(dataclasses.replace(rule, threshold=0.9 * threshold), series) < share
    with pytest.raises(ConfigurationError, match=r"at most 0\.90 for 20 steps"):
        threshold_for((2.0, 0.0), series, 0.95)


def test_what_teacache_cannot_be_fitted_to() -> None:
    with pytest.raises(ConfigurationError, match=r"several denoisers .* each with a polynomial of its own"):
        calibrate_tea_cache(wan(boundary_ratio=0.5), call=wan_call())
    with pytest.raises(ConfigurationError, match="skip must be a share of the steps"):
        calibrate_tea_cache(pixart(), call=pixart_call(), skip=50)
    with pytest.raises(ConfigurationError, match="already optimized"):
        calibrate_tea_cache(tgate_compile.optimize(pixart(), 4, backend="eager"), call=pixart_call())
    with pytest.raises(tgate_compile.UnsupportedModelError, match="stacks of transformer blocks"):
        calibrate_tea_cache(stable_diffusion(layout="small"), ["red cat"], num_inference_steps=3)


@pytest.mark.heavy
def test_teacache_on_the_command_line(tmp_path: Path) -> None:
    run = CliRunner().invoke
    path = tmp_path / "teacache.json"
    given = [
        "tune",
        "--model",
        "sd3",
        "--teacache",
        "--steps",
        "6",
        "--count",
        "2",
        "--skip",
        "0.3",
        "--out",
        str(path),
    ]
    done = run(app, [*given, "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    method = TeaCache(shown["threshold"], coefficients=tuple(shown["coefficients"]), measured=shown["measured"])
    assert load_schedule(path) == Schedule.of(method)
    assert shown["skipped"][f"{method.threshold:g}"] >= 0.3
    assert json.loads(path.read_text())["about"]["r_squared"] == shown["r_squared"]
    done = run(app, [*given, "--force"])
    assert done.exit_code == 0, done.output
    assert "(chosen)" in done.stdout
    assert "steps skipped" in done.stdout
    for wrong in (["--magcache"], ["--plot", str(tmp_path / "a.png")]):
        assert run(app, ["tune", "--model", "sd3", "--teacache", *wrong]).exit_code == 2
    assert run(app, ["tune", "--model", "sd3", "--skip", "0.3"]).exit_code == 2
