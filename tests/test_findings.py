"""`benchmarks/findings.py` on a handful of captions, and the page with its results."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.packages import need
from tgate_compile import Schedule

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "findings.json"
PAGE = ROOT / "docs" / "evidence" / "findings.md"

need("matplotlib", "torchmetrics")

# diffusers 0.42 converts a tensor to an array in a way that is deprecated in numpy 2.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def benchmarks() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import findings
        import findings_plan
        import findings_report

        settings = (
            findings_plan.Setting("sd", 3, contenders={"T-GATE 1": Schedule(1), "2 steps": 2}),
            findings_plan.Setting("sd", 3, "Euler", {"T-GATE 2": Schedule(2)}),
        )
        for name, value in {"SETTINGS": settings, "SINGLES": 1, "PAIRS": 2, "SEEDS": (0, 1), "BATCH": 3}.items():
            patch.setattr(findings, name, value)
        yield findings, findings_report


@pytest.fixture(scope="module")
def measured(benchmarks: tuple[ModuleType, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("findings")
    benchmarks[0].main(["--out", str(folder / "results.json"), "--images", str(folder / "images")])
    return folder


@pytest.mark.heavy
def test_each_setting_has_cost_and_quality_of_each_seed(measured: Path) -> None:
    results = json.loads((measured / "results.json").read_text())
    assert list(results["settings"]) == ["sd, 3 steps", "sd, 3 steps, Euler"]
    own, sd = results["settings"].values()
    assert list(own["rows"]) == ["plain", "T-GATE 1", "2 steps"]
    assert sd["scheduler"] == "EulerDiscreteScheduler"
    assert own["rows"]["plain"]["cost"] == 1
    assert own["rows"]["2 steps"]["cost"] == pytest.approx(2 / 3, abs=1e-4)
    assert 0.55 < sd["rows"]["T-GATE 2"]["cost"] < 2.5 / 3
    assert results["images"]["total"] == 6
    for row in (*own["rows"].values(), *sd["rows"].values()):
        for name in ("pairs", "singles", "frechet"):
            assert len(row[name]["seeds"]) == 2
            assert row[name]["mean"] == pytest.approx(sum(row[name]["seeds"]) / 2, abs=1e-3)
            assert row[name]["sd"] >= 0
        assert row["lost"] + row["gained"] <= 6
    assert "psnr" not in sd["rows"]["plain"]
    assert 5 < sd["rows"]["T-GATE 2"]["psnr"]["mean"] < 70
    model = results["models"]["sd"]
    assert model["parameters_pruned"] < model["parameters"]
    assert model["pruned_step_macs"] < 0.5 * model["full_step_macs"]


@pytest.mark.heavy
def test_missing_images_are_made_again(benchmarks: tuple[ModuleType, ModuleType], measured: Path) -> None:
    before = json.loads((measured / "results.json").read_text())
    images = sorted((measured / "images" / "sd-3-steps" / "images" / "t-gate-1").glob("*.png"))
    assert len(images) == 6
    times = {path: path.stat().st_mtime_ns for path in images}
    os.remove(images[0])
    os.remove(measured / "results.json")
    benchmarks[0].main(["--out", str(measured / "results.json"), "--images", str(measured / "images")])
    assert json.loads((measured / "results.json").read_text()) == before
    made = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert images[0] in made
    assert len(made) == 3  # only its own batch


def test_an_unknown_setting_is_an_error(
    benchmarks: tuple[ModuleType, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        benchmarks[0].main(["--out", str(tmp_path / "results.json"), "--only", "flux*"])
    assert "no setting matches flux*" in capsys.readouterr().err


def test_the_page_has_the_results_tables(benchmarks: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    report = benchmarks[1]
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    for name in report.TABLES:
        assert f"<!-- findings: {name} -->" in page
    assert report.render(page, results) == page, "run benchmarks/findings_report.py"
    copy = tmp_path / "page.md"
    copy.write_text(page.replace(" ± 0.0 |", " |"), encoding="utf-8")
    report.main([str(RESULTS), "--page", str(copy), "--plot", str(tmp_path / "findings.png")])
    assert copy.read_text(encoding="utf-8") == page
    assert (tmp_path / "findings.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="unknown table 'other'"):
        report.render("<!-- findings: other -->\n<!-- end -->", results)


def test_the_results_match_the_plan() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import findings_plan

        results = json.loads(RESULTS.read_text(encoding="utf-8"))
        assert list(results["settings"]) == [setting.name for setting in findings_plan.SETTINGS]
        for setting in findings_plan.SETTINGS:
            assert list(results["settings"][setting.name]["rows"]) == ["plain", *setting.contenders]
        assert results["images"]["seeds"] == list(findings_plan.SEEDS)
