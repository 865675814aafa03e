"""The C++ example builds, and ends with the same latents as the pipeline's own call."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import tgate_compile
from tests.cpp_programs import (
    EXAMPLES,
    assert_checks_arguments,
    assert_decides,
    assert_refused,
    assert_same_latents,
    built,
    exported_decided,
    with_rule_of,
    write_decided_inputs,
    write_inputs,
)
from tests.exported import COMPILED_STEPS, exported_compiled, least
from tgate_compile import BlockCache, DBCache, FirstBlockCache, TeaCache, TGate
from tgate_compile.methods.decisions import Decider, Rule
from tgate_compile.methods.method import forecast_weights

pytestmark = [
    pytest.mark.skipif(not (shutil.which("g++") and shutil.which("cmake")), reason="needs g++ and cmake"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch's CMake files want the CUDA toolkit"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = [f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"]
    return built("cpp", tmp_path_factory.mktemp("cpp"), options)


@pytest.mark.heavy
@pytest.mark.parametrize("binding_times", [False, True])
def test_the_loop_in_cpp(program: Path, binding_times: bool, tmp_path: Path) -> None:
    assert_same_latents(program, exported_compiled("aoti", binding_times=binding_times), tmp_path)


@pytest.mark.sweep
def test_forecasts_in_cpp(program: Path, tmp_path: Path) -> None:
    schedule = BlockCache(2, front=0, forecast=1)
    pipe = tgate_compile.optimize(least(), schedule, backend="eager")
    call = {"prompt": "", "num_inference_steps": COMPILED_STEPS}
    bundle = tgate_compile.export(pipe, tmp_path / "bundle", "aoti", call=call, binding_times=False)
    steps = json.loads((bundle / "manifest.json").read_text())["example"]["steps"]
    assert [step.get("weights", {}) for step in steps] == [{}, {}, {}, {"blocks": [1.5, -0.5]}]
    assert_same_latents(program, bundle, tmp_path, schedule, ["full", "blocks-skipped"] * 2)


@pytest.mark.heavy
def test_another_scheduler(program: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(exported_compiled("aoti"), tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["scheduler"]["class_name"] = "PNDMScheduler"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    inputs = write_inputs(tmp_path / "inputs")
    assert_refused(program, bundle, inputs, "a PNDMScheduler, but this program only supports DDIMScheduler")


@pytest.mark.heavy
def test_wrong_arguments(program: Path, tmp_path: Path) -> None:
    assert_checks_arguments(program, tmp_path)


# Steps that are decided at run time.


#: A program that prints the decisions of rules, and the weights of forecasts.
DECIDES = """
#include <iomanip>
#include "loop.h"

int main(int, char** given) {
  const Json cases = Json::read(given[1]);
  for (const Json& each : cases["rules"].items()) {
    Decider decider(each["rule"]);
    for (const Json& measure : each["measures"].items()) {
      if (measure.is_null()) decider.computed();
      else std::cout << (decider.skips(measure.number()) ? 'K' : 'F');
    }
    std::cout << "\\n";
  }
  for (const Json& each : cases["forecasts"].items()) {
    std::vector<size_t> steps;
    for (const Json& step : each.items()) steps.push_back(step.integer());
    for (const double weight : forecast_weights({steps.begin() + 1, steps.end()}, steps[0]))
      std::cout << std::setprecision(17) << weight << " ";
    std::cout << "\\n";
  }
}
"""


def test_rules_and_forecasts_in_cpp(tmp_path: Path) -> None:
    """The class and the function in loop.h agree with those of the package; a measure of None is a computed step."""
    numbers = random.Random(0)
    rules = [
        Rule(
            threshold=numbers.choice([0.1, 0.25, 0.5]),
            at_threshold=numbers.random() < 0.5,
            coefficients=numbers.choice([(), (1.0, 0.0), (1.5, -0.25, 0.01)]),
            accumulates=numbers.random() < 0.5,
            most_in_row=numbers.choice([None, 1, 2]),
            most=numbers.choice([None, 3]),
        )
        for _ in range(60)
    ]
    measures = [[numbers.choice([0.05, 0.1, 0.25, 0.5, math.nan, None]) for _ in range(16)] for _ in rules]
    expected = []
    for rule, of_rule in zip(rules, measures, strict=True):
        decider = Decider(rule)
        made = [decider.computed() if measure is None else "FK"[decider.skips(measure)] for measure in of_rule]
        expected.append("".join(filter(None, made)))
    forecasts = [[5, 4], [7, 6, 3], [9, 5, 4, 1], [4, 4, 2, 0]]  # the step, and those of the values, newest first
    cases = {
        "rules": [{"rule": asdict(rule), "measures": each} for rule, each in zip(rules, measures, strict=True)],
        "forecasts": forecasts,
    }
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    (tmp_path / "decides.cpp").write_text(DECIDES)
    include, program = str(EXAMPLES / "cpp"), str(tmp_path / "decides")
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", include, str(tmp_path / "decides.cpp")]
    subprocess.run([*command, "-o", program], check=True)
    done = subprocess.run([program, str(tmp_path / "cases.json")], check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[: len(rules)] == expected
    for line, (step, *steps) in zip(lines[len(rules) :], forecasts, strict=True):
        assert [float(weight) for weight in line.split()] == pytest.approx(forecast_weights(steps, step))


#: Steps before and after the gate are computed and skipped, and forecasts have one value or two.
GATED = FirstBlockCache(0.175, forecast=1) + TGate(5)


@pytest.mark.sweep
def test_decided_steps_in_cpp(program: Path, tmp_path: Path) -> None:
    """Without guidance, the values from before the gate have the same shape as those after it, but do not count."""
    bundle = exported_decided("aoti", GATED, scale=1.0)
    assert_decides(program, bundle, tmp_path, GATED, "fkfkfplppl", scale=1.0)


@pytest.mark.sweep
def test_limits_in_cpp(program: Path, tmp_path: Path) -> None:
    """Skipped steps count before and after the gate; those in a row end at a step that is not decided."""
    limited = DBCache(0.2, front=1, warm_up=1, most_in_row=3, most_skipped=5) + TGate(5)
    bundle = with_rule_of(limited, exported_decided("aoti", GATED, scale=1.0), tmp_path / "bundle")
    assert_decides(program, bundle, tmp_path, limited, "fkkkfpllpp", scale=1.0, loads=False)


@pytest.mark.sweep
def test_the_previous_step_in_cpp(program: Path, tmp_path: Path) -> None:
    """TeaCache compares with the previous step, and adds up the changes."""
    method = TeaCache(1.0, coefficients=(1, 0))
    assert_decides(program, exported_decided("aoti", method), tmp_path, method, "FKKFKKFKFF")


@pytest.mark.sweep
def test_a_bundle_without_its_tails(program: Path, tmp_path: Path) -> None:
    """Such bundles were written before the example named the tail and the finish."""
    method = TeaCache(1.0, coefficients=(1, 0))
    bundle = shutil.copytree(exported_decided("aoti", method), tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    for step in manifest["example"]["steps"]:
        step.pop("tail", None)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    inputs = write_decided_inputs(tmp_path / "inputs")
    assert_refused(program, bundle, inputs, "the tail or the finish", "export the bundle again")
