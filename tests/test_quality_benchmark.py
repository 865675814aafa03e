"""`benchmarks/quality.py` with a handful of captions."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import tgate_compile
from tests.packages import need
from tgate_compile.study.evaluation.measure import drawings

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ARGUMENTS = ["--captions", "4", "--steps", "10", "--only", "tgate 5"]

need("matplotlib", "torchmetrics")


@pytest.fixture(scope="module")
def quality() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import quality

        yield quality


@pytest.fixture(scope="module")
def measured(quality: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("quality") / "results.json"
    quality.main(["--out", str(path), "--images", str(path.parent), *ARGUMENTS])
    return path


@pytest.mark.heavy
def test_each_contender_has_its_cost_and_its_quality(measured: Path) -> None:
    results = json.loads(measured.read_text())
    assert list(results["rows"]) == ["plain", "tgate 5"]
    assert results["settings"]["pairs"] == 4
    assert results["settings"]["singles"] == 2
    plain, tgate = results["rows"].values()
    assert plain["strips"] == {"F" * 10: 6}
    assert tgate["strips"] == {"F" * 5 + "p" * 5: 6}
    assert plain["macs"] == plain["macs_with_attention"] == 1
    assert 0.5 < tgate["macs"] < 0.75  # dropping guidance alone leaves 0.75
    assert plain["psnr_to_plain"] is None
    assert 15 < tgate["psnr_to_plain"] < 40
    assert plain["frechet_to_plain"] == pytest.approx(0, abs=0.1)
    assert tgate["frechet_to_plain"] > 1
    for row in (plain, tgate):
        for kind, captions in (("single", 2), ("pair", 4)):
            right = [int(letter) for letter in row[kind]["right"]]
            assert len(right) == captions
            assert row[kind]["accuracy"]["all"] == sum(right) / captions >= 0.5
            assert row[kind]["log_likelihood"] <= 0


def test_existing_measurements_are_kept(quality: ModuleType, measured: Path) -> None:
    results = json.loads(measured.read_text())
    results["rows"]["tgate 5"]["psnr_to_plain"] = -1.0
    measured.write_text(json.dumps(results))
    quality.main(["--out", str(measured), *ARGUMENTS])
    assert json.loads(measured.read_text()) == results


def test_rows_that_are_no_longer_in_the_list_stay(quality: ModuleType, measured: Path, tmp_path: Path) -> None:
    results = json.loads(measured.read_text())
    results["rows"] = {"of old": {"method": "of old"}, "plain": results["rows"]["plain"]}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    images = ["--images", str(measured.parent)]
    quality.main(["--out", str(path), *images, "--captions", "4", "--steps", "10", "--only", "steps 6"])
    assert list(json.loads(path.read_text())["rows"]) == ["plain", "steps 6", "of old"]


def test_other_settings_need_another_file(quality: ModuleType, measured: Path) -> None:
    before = measured.read_text()
    with pytest.raises(SystemExit, match="results of other settings"):
        quality.main(["--out", str(measured), "--captions", "5"])
    assert measured.read_text() == before


def test_a_name_that_nothing_has_is_an_error(
    quality: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        quality.main(["--out", str(tmp_path / "results.json"), "--only", "tgate five"])
    assert "no contender matches tgate five" in capsys.readouterr().err


def test_every_contender_is_a_schedule_with_a_distinct_name(quality: ModuleType) -> None:
    from tgate_compile.methods.schedule import Schedule

    names = [contender.name for contender in quality.CONTENDERS]
    assert len(names) == len(set(names))
    scheduled = {field.name for field in fields(Schedule)}
    for contender in quality.CONTENDERS:
        if contender.options is not None:
            inspect.signature(tgate_compile.optimize).bind(None, **contender.options)
            Schedule(**{name: value for name, value in contender.options.items() if name in scheduled})


def test_the_judge_counts_losses(quality: ModuleType) -> None:
    settings = quality.Settings(pairs=8, singles=8, caption_seed=3)
    judge = quality.Judge(settings)
    drawn = drawings(settings.captions, each=1, seed=5)
    judge.set_plain(drawn)
    wrong = drawn.clone()
    wrong[8:10] = drawn[[9, 8]]  # two images swapped: neither matches its caption

    result = judge(wrong)

    assert result["single"]["accuracy_minus_plain"] == 0
    assert result["single"]["right"] == "1" * 8
    assert result["pair"]["right"] == "00" + "1" * 6
    assert (result["pair"]["lost"], result["pair"]["gained"]) == (2, 0)
    assert result["pair"]["accuracy_minus_plain"] == -0.25
    differences = torch.tensor([-1.0] * 2 + [0.0] * 6)
    assert result["pair"]["accuracy_minus_plain_se"] == pytest.approx(differences.std().item() / math.sqrt(8), abs=1e-4)
    assert result["pair"]["log_likelihood_minus_plain"] < -1
    assert result["frechet_to_plain"] == pytest.approx(0, abs=0.1)  # the same images, in another order


def test_the_plot_is_drawn(measured: Path, quality: ModuleType, tmp_path: Path) -> None:
    import quality_plot
    from PIL import Image

    path = tmp_path / "plot.png"
    quality_plot.main([str(measured), "--out", str(path)])
    with Image.open(path) as image:
        assert image.width > 800
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10


def test_samples_show_what_a_contender_gets_wrong(measured: Path, quality: ModuleType, tmp_path: Path) -> None:
    import quality_samples
    from PIL import Image

    results = json.loads(measured.read_text())
    results["rows"]["tgate 5"]["pair"]["right"] = "0110"
    results["rows"]["tgate 5"]["single"]["right"] = "11"
    data, path = tmp_path / "results.json", tmp_path / "samples.png"
    data.write_text(json.dumps(results))
    (folder,) = (entry for entry in measured.parent.iterdir() if entry.is_dir())

    quality_samples.main([str(folder), str(data), "--contenders", "tgate 5", "--out", str(path)])

    tile, gap, title = quality_samples.TILE, quality_samples.GAP, quality_samples.TITLE
    with Image.open(path) as image:
        assert image.size == (2 * tile + gap, 2 * (title + tile + gap))
        second = image.convert("RGB").crop((tile + gap, title, 2 * tile + gap, title + tile)).resize((64, 64))
    plain = np.load(folder / "plain.npy")[2 + 3].transpose(1, 2, 0)
    assert np.abs(np.asarray(second).astype(float) - plain).mean() < 3
