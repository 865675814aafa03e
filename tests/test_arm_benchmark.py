"""`benchmarks/arm.py`: its arguments, its rows, and one run on the emulated processor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import arm, arm_machine, arm_tasks
from tests.programs import program

ROOT = "TGATE_ARM_ROOT"


def message(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the error of the command with these arguments."""
    with pytest.raises(SystemExit) as ended:
        arm.main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--root FOLDER is required" in message(capsys)
    assert "must be outside the repository" in message(capsys, "--root", str(arm_machine.REPOSITORY / "arm"))
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert "needs Linux on x86_64, but this is linux on riscv64" in message(capsys, "--root", str(tmp_path))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = "sudo apt-get install apt dpkg g++-aarch64-linux-gnu qemu-user-static"
    assert missing in message(capsys, "--root", str(tmp_path))


def test_only_the_chosen_cases() -> None:
    every = arm.cases((), (), ())
    assert len({case.name for case in every}) == len(every)
    assert {case.model for case in every if case.target == "onnxruntime"} == {"sd", "sdxl", "pixart", "lcm"}
    names = [case.name for case in arm.cases(["onnxruntime"], ["lcm"], ["int8"])]
    assert names == ["onnxruntime-lcm-int8", "onnxruntime-lcm-int8-sequential"]
    assert not arm.cases(["aoti-cpp"], ["lcm"], ())


MEASURED = """
import json, sys
from pathlib import Path
from benchmarks import arm

heavy = [name for name in ("torch", "numpy") if name in sys.modules]
large = arm.run([sys.executable, "-c", "kept = b'x' * 300_000_000; print('before'); print('{}')"], Path(sys.argv[1]))
small = arm.run([sys.executable, "-c", "print({})"], Path(sys.argv[1]))
print(json.dumps({"heavy": heavy, "result": large.result, "peaks": [large.peak_bytes, small.peak_bytes]}))
"""


def test_a_process_and_its_peak(tmp_path: Path) -> None:
    """The peak is that of one process. It counts the memory of its parent, so the benchmark imports nothing large."""
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "log")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=arm_machine.REPOSITORY)
    found = json.loads(done.stdout)
    assert found["heavy"] == []
    assert found["result"] == {}
    large, small = found["peaks"]
    assert 300e6 < large < 400e6
    assert 5e6 < small < 100e6


def test_why_a_process_failed(tmp_path: Path) -> None:
    code = "from tgate_compile import ConfigurationError as E; raise E('no x at /home/user/weights.bin')"
    with pytest.raises(arm_machine.FailedError, match=r"^ConfigurationError: no x at weights\.bin$"):
        arm_machine.run([sys.executable, "-c", code], tmp_path / "log")
    with pytest.raises(arm_machine.FailedError, match=r"^the process was killed by SIGSEGV$"):
        arm_machine.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"], tmp_path / "log")
    assert arm_machine.reason(1, "") == "no message"


def test_images_are_compared(tmp_path: Path) -> None:
    image = np.random.default_rng(0).random((8, 8, 3), dtype=np.float32)
    paths = {name: tmp_path / f"{name}.npy" for name in ("image", "near", "other", "broken")}
    near = image.copy()
    near[0, 0, 0] += np.float32(0.01)
    for name, value in (("image", image), ("near", near), ("other", image[:4]), ("broken", image * np.nan)):
        np.save(paths[name], value)
    assert arm_tasks.compare(paths["image"], paths["image"]) == {"psnr_db": None, "largest_difference": 0.0}
    found = arm_tasks.compare(paths["near"], paths["image"])
    assert found["psnr_db"] == pytest.approx(10 * np.log10(192 / 0.01**2), abs=0.1)
    assert found["largest_difference"] == pytest.approx(0.01, rel=1e-3)
    for name in ("other", "broken"):
        with pytest.raises(ValueError, match="the image has the shape"):
            arm_tasks.compare(paths[name], paths["image"])


def test_failures_are_rows_and_results_are_kept(tmp_path: Path) -> None:
    bench = arm.Bench(arm_machine.Arm(tmp_path))
    case = arm.Case("onnxruntime", "sd", "float32", True)
    (tmp_path / "bundles" / case.bundle).mkdir(parents=True)
    row = bench.row(case)
    assert row.pop("reason").startswith("on x86, BundleError: ")
    common = {"target": "onnxruntime", "model": "sd", "precision": "float32", "sequential": True}
    assert row == {**common, "result": "failed"}

    measured = [{"peak": 1}, {"peak": 2}, {"peak": 3}]
    assert bench.kept("name", "onnxruntime", lambda: measured[0]) == {"peak": 1}
    assert bench.kept("name", "onnxruntime", lambda: measured[1]) == {"peak": 1}
    other = arm.Bench(arm_machine.Arm(tmp_path, cpu="max"))
    assert other.kept("name", "onnxruntime", lambda: measured[1]) == {"peak": 2}
    again = arm.Bench(other.arm, again=True)
    assert again.kept("name", "onnxruntime", lambda: measured[2]) == {"peak": 3}


def test_the_committed_result() -> None:
    """Each target has a row that ran, or a reason; and no row claims a speed."""
    results = json.loads((arm_machine.REPOSITORY / "benchmarks" / "results" / "arm.json").read_text())
    expected = [case.name for case in arm.cases((), (), ())]
    names = ("target", "model", "precision", "sequential")
    assert [arm.Case(*(row[name] for name in names)).name for row in results["rows"]] == expected
    for row in results["rows"]:
        assert (row["result"] == "ran" and row["arm_peak_bytes"]) or row["reason"]
    assert {row["target"] for row in results["rows"] if row["result"] == "ran"} == set(arm.TARGETS)
    assert not any("seconds" in key or key.endswith("_s") for row in results["rows"] for key in row)


@pytest.mark.heavy
def test_a_bundle_on_arm(tmp_path: Path) -> None:
    if missing := arm_machine.missing_tools():
        pytest.skip(f"needs the Debian packages {' '.join(missing)}")
    if ROOT not in os.environ:
        pytest.skip(f"{ROOT} does not name the folder that `python -m benchmarks.arm --root` has filled")
    emulated = arm_machine.Arm(Path(os.environ[ROOT]))
    folder = program()
    images = {}
    code = (
        "import numpy, sys; from tgate_compile.runtime import BundlePipeline;"
        "numpy.save(sys.argv[2], BundlePipeline(sys.argv[1], threads=1)('a circle', seed=0, output='numpy'))"
    )
    environment = emulated.environment(("runtime",))
    for name, python in (("arm", emulated.command(emulated.python)), ("x86", [sys.executable])):
        images[name] = tmp_path / f"{name}.npy"
        arm_machine.run(
            [*python, "-c", code, folder, images[name]], tmp_path / name, environment if name == "arm" else None
        )
    assert arm_tasks.compare(images["arm"], images["x86"])["psnr_db"] > 60
