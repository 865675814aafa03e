"""The examples run unmodified and offline, and the custom loop makes the same image as the pipeline's call."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMPT = "a large red circle on a blue background"  # of own_loop.py

# diffusers 0.42 converts a tensor to an array in a way that is deprecated in numpy 2.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]


def run_example(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def pixels(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    with Image.open(path) as image:
        return np.asarray(image, dtype=np.int64)


def test_examples_are_short_and_all_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"text_to_image.py", "own_loop.py", "own_denoiser.py"}
    assert all(len(path.read_text(encoding="utf-8").splitlines()) < 60 for path in EXAMPLES.glob("*.py"))


def test_the_own_loop_makes_the_pipelines_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_example("text_to_image.py", monkeypatch, "--prompt", PROMPT, "--out", str(tmp_path / "call.png"))
    assert "FFFFFFFFFFppppppppppppppp" in capsys.readouterr().out
    run_example("own_loop.py", monkeypatch, "--out", str(tmp_path / "loop.png"))
    assert "FFFFFFFFFFppppppppppppppp" in capsys.readouterr().out
    by_call, by_loop = pixels(tmp_path / "call.png"), pixels(tmp_path / "loop.png")
    assert by_call.shape == (64, 64, 3)
    assert np.abs(by_call - by_loop).max() <= 1


def test_a_denoiser_of_ones_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_example("own_denoiser.py", monkeypatch)
    printed = capsys.readouterr().out
    assert "4 sites" in printed
    assert "blocks.3.cross" in printed
    assert "FFFFFFFFpppppppppppp" in printed
