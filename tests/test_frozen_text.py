"""`benchmarks/frozen_text.py` on a handful of captions."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.packages import need
from tgate_compile import AdaptiveGuidance, DeepCache, load_demo_pipeline

ROOT = Path(__file__).parents[1]

need("torchmetrics")

# diffusers 0.42 converts a tensor to an array in a way that is deprecated in numpy 2.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import frozen_text

    monkeypatch.setattr(frozen_text, "STEPS", 4)
    monkeypatch.setattr(frozen_text, "MODEL", "pixart")  # any model with a transformer will do
    # A transformer has no deep layers, so the second method is not supported.
    monkeypatch.setattr(
        frozen_text, "METHODS", {"guidance ends": AdaptiveGuidance, "deep layers reused": lambda gate: DeepCache(gate)}
    )
    return frozen_text


def run(benchmark: ModuleType, folder: Path, *more: str) -> dict[str, Any]:
    few = ["--gates", "2", "--singles", "1", "--pairs", "1", "--seeds", "0", "1"]
    benchmark.main(["--out", str(folder / "results.json"), "--images", str(folder / "images"), *few, *more])
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def test_methods_beside_fewer_steps_at_their_cost(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run(benchmark, tmp_path)
    rows = results["rows"]
    assert list(rows) == ["plain", "guidance ends at 2", "3 steps"]
    plain, ended, fewer = rows.values()
    assert (plain["cost"], ended["cost"], fewer["cost"]) == (1, 0.75, 0.75)
    assert ended["strips"] == {"FFff": 4}
    for row in rows.values():
        for name in ("singles", "pairs", "frechet"):
            assert len(row[name]["seeds"]) == 2
    for row in (ended, fewer):
        assert 0 < row["drift"]["mean"] < 1
        assert 5 < row["psnr"]["mean"] < 70
    assert "UNet" in results["unsupported"]["deep layers reused"]
    printed = capsys.readouterr().out
    assert "| guidance ends at 2 | 0.75 |" in printed


def test_a_checkpoint_instead_of_the_shipped_weights(benchmark: ModuleType, tmp_path: Path) -> None:
    weights = load_demo_pipeline("pixart").transformer.state_dict()
    halved = {name: 0.5 * value for name, value in weights.items()}
    checkpoint = {"average": halved, "step": 7, "samples": 448, "seconds": 60.0}
    assert torch.equal(benchmark.pipeline(checkpoint).transformer.proj_out.weight, halved["proj_out.weight"])
    torch.save(checkpoint, tmp_path / "minute001.pt")
    results = run(benchmark, tmp_path, "--checkpoint", str(tmp_path / "minute001.pt"))
    assert results["training"] == {"steps": 7, "samples": 448, "cpu_minutes": 1.0}
    assert (tmp_path / "images" / "step7").is_dir()
