"""`tgate-compile compare`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests import tiny_pipelines
from tgate_compile import Fora, Schedule, save_schedule
from tgate_compile._cli import loading
from tgate_compile._cli.app import app

run = CliRunner().invoke


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with a tiny latent consistency pipeline with random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipelines.latent_consistency().save_pretrained(folder)
    return str(folder)


def test_several_models_make_one_page(model: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    chosen = ["-p", "red cat", "-p", "blue dog", "--seed", "3", "--steps", "4", "--gate-step", "2"]
    arguments = ["compare", "-m", model, "-m", "embedded:none", *chosen, "-o", str(out)]
    result = run(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert "embedded:none" in result.stderr  # a note
    data = json.loads(result.stdout)
    written = data.pop("written")
    assert json.loads(Path(written["figures"]).read_text()) == data
    good, bad = data["models"]
    assert bad["error"].startswith("ConfigurationError: The embedded model must be one of")
    assert (good["prompts"], good["seeds"], good["steps"], good["gate"]) == (["red cat", "blue dog"], [3, 4], 4, 2)
    ran = {method["key"]: method for method in good["methods"] if method["why_not"] is None}
    assert set(ran) == {"plain", "tgate", "deepcache", "deepcache_tgate"}
    assert ran["tgate"]["strip"] == "ffpp"
    assert ran["tgate"]["cost"] < 1 == ran["plain"]["cost"]
    page = Path(written["page"]).read_text(encoding="utf-8")
    assert page.count('class="shot"') == 2 * len(ran)
    again = run(app, arguments)
    assert again.exit_code == 1
    assert "--force" in again.stderr


def test_one_model_that_fails_is_an_error(tmp_path: Path) -> None:
    result = run(app, ["compare", "-m", "embedded:none", "-o", str(tmp_path)])
    assert result.exit_code == 1
    assert "The embedded model must be one of" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["-p", "red cat", "--prompts", "a.txt"], "not both"),
        (["--prompts", "none.txt"], "No such file"),
        (["-o", "pyproject.toml/folder"], "Cannot write to the folder"),
        (["--method", "tea_cache"], "--method: expected one of tgate, "),
        (["--schedule", "none.json"], "No such file"),
    ],
)
def test_errors_come_before_a_model_is_loaded(
    arguments: list[str], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load", None)
    result = run(app, ["compare", *arguments])
    assert result.exit_code == 1
    assert shown in result.stderr


def test_the_table_is_printed(model: str, tmp_path: Path) -> None:
    """Methods are chosen by name, and from a schedule file; they are in the order of the tables."""
    save_schedule(Schedule.of(Fora(2)), tmp_path / "mine.json")
    chosen = ["--method", "fewer_steps", "--method", "adaptive_guidance", "--schedule", str(tmp_path / "mine.json")]
    given = ["-p", "red cat", "--steps", "2", "--gate-step", "1", "-o", str(tmp_path)]
    result = run(app, ["compare", "-m", model, *chosen, *given])
    assert result.exit_code == 0, result.output
    for shown in ("mine", "Adaptive Guidance: This model runs without", "comparison.html"):
        assert shown in result.stdout.replace("\n", " ")
    (compared,) = json.loads((tmp_path / "comparison.json").read_text())["models"]
    assert [method["title"] for method in compared["methods"]] == ["plain", "Adaptive Guidance", "mine", "fewer steps"]
    assert compared["methods"][2]["strip"] == "fh"
