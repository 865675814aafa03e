"""`benchmarks/web.py`, on a site with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.browsing import chromium
from tests.programs import program
from tgate_compile._errors import ConfigurationError
from tgate_compile._web.site import runtime_files, write_site

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def web() -> Any:
    with chromium(), pytest.MonkeyPatch.context() as patch:  # skips without Chromium
        patch.syspath_prepend(str(BENCHMARKS))
        import web

        yield web


@pytest.mark.heavy
def test_steps_bytes_and_memory(web: Any, tmp_path: Path) -> None:
    try:
        runtime = runtime_files()
    except ConfigurationError as error:
        pytest.skip(f"no ONNX Runtime for browsers: {error}")
    write_site(tmp_path / "site", program(), runtime)
    arguments = ["--site", str(tmp_path / "site"), "--threads", "1", "--pairs", "2", "--warm-up", "1"]
    web.main([*arguments, "--out", str(tmp_path / "results.json")])
    results = json.loads((tmp_path / "results.json").read_text())
    (row,) = results["rows"]
    assert len(row["pairs"]) == 3
    for pair in row["pairs"]:
        assert pair["plain"]["strip"] == "F" * len(pair["tgate"]["strip"])
        assert pair["tgate"]["strip"].startswith("F")
        assert pair["tgate"]["strip"].endswith("p")
        assert pair["tgate"]["graphs"][-1] == "pruned"
        assert min(ms for run in pair.values() for ms in run["ms"]) > 0
    timed = [sum(pair["tgate"]["ms"]) / 1e3 for pair in row["pairs"][1:]]  # without the warm-up
    assert row["image_s"]["tgate"]["median"] == pytest.approx(sum(timed) / 2)
    assert set(row["step_ms"]) == {"full", "pruned"}
    assert row["fetched"]["runtime"] == runtime["ort-wasm-simd-threaded.wasm"].stat().st_size
    assert row["fetched"]["bundle"] < results["low_memory"]["fetched"]["bundle"]
    assert results["cache_bytes"] > 0
