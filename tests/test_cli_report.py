"""`tgate-compile report`: the paper's rows and any other schedule."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tgate_compile._cli.app import app
from tgate_compile.study.cost import paper_tables

run = CliRunner().invoke


@pytest.mark.heavy
def test_the_papers_rows_as_json() -> None:
    result = run(app, ["report", "--paper", "--architecture", "sd15", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    given = [row for row in paper_tables()["rows"] if row["model"] == "sd15"]
    assert len(rows) == len(given) == 3
    for row, theirs in zip(rows, given, strict=True):
        assert theirs.items() <= row.items()
        assert row["deviation"] == pytest.approx(row["ours_macs_t"] / row["macs_t"] - 1)
        assert abs(row["deviation"]) < 1e-3
        assert row["ours_macs_with_attention_t"] > row["ours_macs_t"]
    assert [row["ours_params_m"] for row in rows] == pytest.approx([859.521, 815.558, 815.558], abs=1e-3)


def test_the_papers_rows_as_a_table() -> None:
    result = run(app, ["report", "--paper", "--architecture", "sd15"])
    assert result.exit_code == 0, result.output
    for shown in ("deviation", "gate step 5", "9.875", "9.873", "-0.021%", "20.082"):
        assert shown in result.stdout


@pytest.mark.heavy
def test_any_schedule_with_its_baselines() -> None:
    options = ["--gate-step", "10", "--sp-interval", "3", "--warm-up", "2", "--steps", "20"]
    result = run(app, ["report", "--architecture", "sd15", *options, "--json"])
    assert result.exit_code == 0, result.output
    asked, dropped, plain = json.loads(result.stdout)
    assert [row["method"] for row in (asked, dropped, plain)] == ["tgate", "guidance_drop", "none"]
    assert (asked["gate_step"], asked["sp_interval"], asked["warm_up"], asked["steps"]) == (10, 3, 2, 20)
    assert asked["ours_strip"] == "FFFFSSFSSF" + "p" * 10
    assert dropped["ours_strip"] == "F" * 10 + "f" * 10
    assert asked["ours_macs_t"] < dropped["ours_macs_t"] < plain["ours_macs_t"]
    table = run(app, ["report", "--architecture", "sd15", *options])
    assert "guidance step 10 alone" in " ".join(table.stdout.split())


@pytest.mark.heavy
def test_a_method_that_skips_blocks() -> None:
    options = ["--blockcache-interval", "2", "--steps", "4"]
    result = run(app, ["report", "--architecture", "pixart_alpha", *options, "--json"])
    assert result.exit_code == 0, result.output
    asked, plain = json.loads(result.stdout)
    assert (asked["method"], asked["ours_strip"], plain["method"]) == ("blockcache", "FKFK", "none")
    # One of 28 blocks remains in every other step, beside the embeddings.
    assert 0.5 < asked["ours_macs_t"] / plain["ours_macs_t"] < 0.54


def test_without_guidance_there_is_none_to_drop() -> None:
    result = run(
        app, ["report", "--architecture", "sd15", "--gate-step", "0.5", "--guidance", "1", "--steps", "4", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert [(row["method"], row["ours_strip"]) for row in json.loads(result.stdout)] == [
        ("tgate", "ffpp"),
        ("none", "ffff"),
    ]


def test_a_gate_beyond_the_end_is_noted() -> None:
    result = run(app, ["report", "--architecture", "sd15", "--gate-step", "30", "--json"])
    assert result.exit_code == 0, result.output
    assert "nothing is gated" in result.stderr
    assert len({row["ours_macs_t"] for row in json.loads(result.stdout)}) == 1


@pytest.mark.heavy
def test_parameters_by_binding_time() -> None:
    result = run(app, ["report", "--binding-times", "--model", "sd15", "--json"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert row["model"] == "sd15"
    assert row["params_b"] == pytest.approx(0.859521, abs=1e-6)
    assert row["prompt_b"] + row["timestep_b"] + row["step_b"] == pytest.approx(row["params_b"])
    assert 0.019 < row["prompt_b"] < 0.020  # the keys and values of the cross-attentions
    assert row["pruned_step_b"] < row["step_b"]
    table = run(app, ["report", "--binding-times", "--model", "sd15"])
    assert "0.812" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--paper"),
        (["--paper", "--steps", "4", "--guidance", "1"], "--steps, --guidance"),
        (["--architecture", "sd14"], "must be one of sd15, sd21"),
        (["--binding-times", "--model", "sd14"], "must be one of sd15, sd21"),
        (["--binding-times", "--architecture", "sd15", "--steps", "4"], "Leave out --steps, --architecture"),
        (["--architecture", "sd15", "--model", "sd15"], "mean the same"),
        (["--model", "sd15", "--size", "512", "--width", "512"], "Leave out --width"),
        (["--model", "sd15", "--text-tokens", "20"], "models with joint attention"),
        (["--model", "flux1_dev", "--gate-step", "9", "--fi-interval", "2"], "fi_interval at 1"),
        (["--architecture", "sd15", "--sp-interval", "3"], "need a gate_step"),
        (["--architecture", "sd15", "--height", "500"], "not a multiple of 8"),
        (["--architecture", "pixart_sigma", "--deepcache-interval", "3"], "DeepCache needs a UNet"),
    ],
)
def test_wrong_options(arguments: list[str], expected: str) -> None:
    result = run(app, ["report", *arguments])
    assert result.exit_code != 0
    assert expected in " ".join(result.stderr.replace("│", " ").split())
    assert not result.stdout
