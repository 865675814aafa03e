"""Times disturbed by other load are not printed as results. All times here are made up."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests import tiny_pipelines
from tgate_compile._cli import bench as bench_command
from tgate_compile._cli import compare as compare_command
from tgate_compile.methods.schedule import Schedule
from tgate_compile.study.bench.measure import Timed
from tgate_compile.study.bench.methods import methods_for
from tgate_compile.study.bench.result import Benchmark, BenchmarkRow, spread_of, why_unreliable
from tgate_compile.study.comparison import run as comparison_run
from tgate_compile.study.comparison.page import page_of
from tgate_compile.study.comparison.result import Comparison, MethodFigures, ModelFigures
from tgate_compile.study.comparison.run import Task, compare_model
from tgate_compile.study.tuning import measure
from tgate_compile.study.tuning.plans import fewer_steps
from tgate_compile.study.tuning.recorder import Convergence
from tgate_compile.study.tuning.result import Tuning, TuningRow
from tgate_compile.study.tuning.search import tune

#: How many smaller numbers of steps tuning tries instead of 6.
NUMBERS = len(fewer_steps(6))
QUIET = (1.0, 1.02, 1.05)


class Clock:
    """Replaces `time`: generations take the given `seconds` in turn, repeatedly."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self._seconds = itertools.cycle(seconds)
        self._now = 0.0
        self._inside = False

    def perf_counter(self) -> float:
        if self._inside:
            self._now += next(self._seconds)
        self._inside = not self._inside
        return self._now


@pytest.mark.parametrize(
    ("own", "plain", "words"),
    [
        (QUIET, QUIET, None),
        ((1.0, 1.0, 9.0), QUIET, None),  # one disturbed run does not move the median
        ((1.0, 1.5, 1.6), QUIET, "its times range from 1 s to 1.6 s, with a median of 1.5 s"),
        (QUIET, (2.0, 7.0, 8.0), "the plain pipeline's times range from 2 s to 8 s"),
        ((1.0,), (3.0,), None),  # unknown from a single time
        ((), (), None),
    ],
)
def test_times_that_differ_too_much(own: Sequence[float], plain: Sequence[float], words: str | None) -> None:
    why = why_unreliable(own, plain)
    assert why is None if words is None else words in str(why)


def test_a_gain_that_the_operations_do_not_explain() -> None:
    assert "15.17 times as fast at 0.57" in str(why_unreliable(QUIET, QUIET, speedup=15.17, cost=0.57))
    assert why_unreliable(QUIET, QUIET, speedup=1.8, cost=0.57) is None
    assert why_unreliable(QUIET, QUIET, speedup=4.5, cost=0.57) is not None
    assert why_unreliable(QUIET, QUIET, speedup=4.5, cost=0.57, most_gain=8.0) is None  # a faster backend explains it
    assert spread_of((1.0, 2.0, 2.0)) == 1.0
    assert spread_of((1.0,)) is None


# compare


def model(times: Mapping[str, Sequence[float]], backend: str = "eager") -> ModelFigures:
    """Return a model with a method for each of `times`, the plain one first; the others have 0.57 of its operations."""
    methods = tuple(
        MethodFigures(
            key, key, "", 6, "FFFppp", seconds=sorted(runs)[len(runs) // 2], step_seconds=(0.1,) * 6,
            macs=0.57e9 if index else 1e9, run_seconds=tuple(runs),
        )
        for index, (key, runs) in enumerate(times.items())
    )  # fmt: skip
    setting = dict.fromkeys(("pipeline", "denoiser", "scheduler", "device", "dtype", "guidance scale"), "x")
    return ModelFigures("tiny", None, setting | {"backend": backend}, 6, 3, True, 2_000_000, methods=methods)


SPOILED = {"plain": (15.0, 15.2, 15.5), "tgate": QUIET, "disturbed": (7.0, 12.0, 13.0), "fine": (9.0, 9.1, 9.9)}


def test_a_comparison_marks_what_is_not_reliable() -> None:
    of_model = model(SPOILED)
    comparison = Comparison("command", {"device": "cpu"}, (of_model,), {"tiny": {}})
    rows = {row["key"]: row for row in json.loads(json.dumps(comparison.as_dict()))["models"][0]["methods"]}
    assert "at 0.57 of the operations" in rows["tgate"]["unreliable"]
    assert "range from 7 s to 13 s" in rows["disturbed"]["unreliable"]
    assert [row["speedup"] for row in rows.values()] == [1.0, None, None, pytest.approx(15.2 / 9.1)]
    assert rows["fine"]["unreliable"] is None
    assert rows["disturbed"]["spread"] == pytest.approx(12 / 7 - 1)

    page = page_of(comparison)
    assert "14.90x" not in page
    assert "1.27x" not in page
    assert "1.67x" in page
    assert page.count(">time unreliable<") == 4  # two methods, in both tables
    assert 'title="its times range from 7 s to 13 s' in page

    table = compare_command._table(of_model)
    speeds = list(table.columns[2].cells)
    assert speeds == ["1.00", "?", "?", "1.67"]
    assert "tgate: ?: its time is unreliable" in str(table.caption)


def test_a_disturbed_plain_pipeline_spoils_all_rows() -> None:
    of_model = model({"plain": (10.0, 15.0, 16.0), "tgate": (9.0, 9.1, 9.2)})
    assert all("plain pipeline's times" in str(of_model.why_unreliable(row)) for row in of_model.methods[1:])


def test_a_backend_may_bring_more() -> None:
    times = {"plain": (15.0, 15.2, 15.5), "tgate": (3.0, 3.1, 3.2)}
    assert model(times).why_unreliable(model(times).methods[1]) is not None
    assert model(times, "openvino").why_unreliable(model(times).methods[1]) is None


def test_results_of_older_versions_have_no_runs() -> None:
    of_model = model(SPOILED)
    older = dataclasses.replace(
        of_model, methods=tuple(dataclasses.replace(row, run_seconds=()) for row in of_model.methods)
    )
    assert older.why_unreliable(older.methods[2]) is None


def test_a_comparison_of_one_prompt_times_it_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The methods take turns; every generation of the second one takes 9 seconds."""
    order: list[str] = []
    own = comparison_run._Comparing._generate

    def generate(self: Any, pipe: Any, method: Any, prompt: int, steps: int) -> Timed:
        order.append(method.key)
        timed = own(self, pipe, method, prompt, steps)
        return dataclasses.replace(timed, seconds=9.0 if method.key == "tgate" else 10.0)

    monkeypatch.setattr(comparison_run._Comparing, "_generate", generate)
    three = [method for method in methods_for(2) if method.key in ("plain", "tgate", "fewer_steps")]
    monkeypatch.setattr(comparison_run, "methods_for", lambda gate: three)
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    found, pictures = compare_model("tiny", pipe, Task(("red cat",), (0,), 4, 2, {}), judged=False)
    plain, tgate = found.methods[:2]
    assert (plain.run_seconds, tgate.run_seconds) == ((10.0,) * 3, (9.0,) * 3)
    assert found.speedup(tgate) == pytest.approx(10 / 9)
    assert len(plain.images) == len(pictures["plain"]) == 1
    keys = ["plain", "tgate", "fewer_steps"]
    assert order[-9:] == [*keys, *keys[1:], keys[0], keys[2], *keys[:2]]


# bench


def test_a_benchmark_marks_what_is_not_reliable() -> None:
    plain = BenchmarkRow("plain", "plain", "", "plain", seconds=[3.0, 3.1, 3.2], macs=100.0)
    fine = BenchmarkRow("a", "a", "eager", "plain", seconds=[2.0, 2.0, 2.1], macs=60.0)
    disturbed = BenchmarkRow("b", "b", "eager", "plain", seconds=[1.0, 2.0, 2.0], macs=60.0)
    too_fast = BenchmarkRow("c", "c", "eager", "plain", seconds=[0.3, 0.3, 0.3], macs=60.0)
    runtime = BenchmarkRow("plain_ort", "d", "ort", "plain", seconds=[1.0, 1.0, 1.0], macs=100.0)
    both = BenchmarkRow("e", "e", "ort", "plain_ort", seconds=[0.3, 0.3, 0.3], macs=60.0)
    failed = BenchmarkRow("f", "f", "", "plain", error="no")
    benchmark = Benchmark({}, {}, 10, 5, (plain, fine, disturbed, too_fast, runtime, both, failed))
    rows = {row["key"]: row for row in json.loads(json.dumps(benchmark.as_dict(), allow_nan=False))["rows"]}
    assert {key for key, row in rows.items() if row["unreliable"]} == {"b", "c"}
    for key in "bc":
        assert [rows[key][name] for name in ("speedup", "speedup_over_baseline", "efficiency")] == [None] * 3
    assert rows["a"]["speedup"] == pytest.approx(3.1 / 2.0)
    cells = {row.key: bench_command._cells(benchmark, row) for row in (plain, fine, disturbed)}
    assert cells["a"][1:4] == ["1.55", "1.667", "0.93"]
    assert cells["b"][1:4] == ["?", "1.667", "?"]
    assert cells["plain"][1] == "1.00"


# tune


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipelines.stable_diffusion(layout="small")


def tuned(pipe: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Tuning:
    monkeypatch.setattr(measure, "time", clock)
    return tune(pipe, ["red cat"], num_inference_steps=6, tolerance=9.0, seeds=(0, 1), candidates=[Schedule(2)])


def test_both_sides_of_a_ratio_are_warm(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first plain generations, which are recorded, and the first one of each contender do not count."""
    # Two recorded plain ones, two timed ones, two of the schedule, two for each number of steps, and two timed ones.
    seconds = [50.0, 60.0, 4.0, 4.0, 70.0, 3.0, *[80.0, 2.0] * NUMBERS, 4.0, 4.0]
    tuning = tuned(pipe, Clock(seconds), monkeypatch)
    assert [row.time for row in tuning.table if row.schedule == Schedule(2)] == [0.75]
    assert {row.time for row in tuning.table if row.schedule is None} == {0.5}
    assert not any(row.unreliable for row in tuning.table)


def test_tuning_marks_what_is_not_reliable(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [50.0, 60.0, 4.0, 9.0, 70.0, 3.0, *[80.0, 2.0] * NUMBERS, 9.0, 9.0]
    tuning = tuned(pipe, Clock(seconds), monkeypatch)
    assert {row.time for row in tuning.table} == {None}
    assert all("plain pipeline's times range from 4 s to 9 s" in str(row.unreliable) for row in tuning.table)
    assert tuning.as_dict()["table"][0]["unreliable"]
    assert str(tuning).count(" ?\n") == len(tuning.table)


@pytest.mark.parametrize(
    ("cost", "drift", "words"),
    [
        (0.6, 0.04, "Fewer steps would do better: 3 steps without a schedule cost 0.600, with drift 0.040"),
        (0.6, 0.05, "Fewer steps would do better"),
        (0.6, 0.06, None),
        (0.5, 0.06, "Fewer steps would do as well: 3 steps without a schedule cost 0.500"),
        (0.6001, 0.04, "Fewer steps would do better"),  # also shown as 0.600
        (0.7, 0.01, None),
        (0.5, 0.2, None),
    ],
)
def test_fewer_steps_that_cost_as_little(cost: float, drift: float, words: str | None) -> None:
    chosen = TuningRow("T-GATE", "gate", Schedule(3), "FFFppp", 0.6, 0.05, 0.0, 0.05, True, None)
    fewer = TuningRow("fewer steps", "3 steps", None, "FFF", cost, drift, 0.0, drift, drift <= 0.1, None)
    tuning = Tuning(Schedule(3), (chosen, fewer), Convergence((), ()), 0.1, 6, 6, (), (0,), {}, {})
    assert len(tuning.remarks) == (words is not None)
    assert words is None or words in tuning.remarks[0]
