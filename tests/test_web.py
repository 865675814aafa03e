"""The page in a real browser: its images match the pipelines in PyTorch, and its numbers match the run."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.browsing import chromium, show_at
from tests.programs import noise, program, psnr
from tests.tiny_pipelines import PROMPT
from tgate_compile import load_demo_pipeline, optimize, restore
from tgate_compile._cli.app import app
from tgate_compile._errors import ConfigurationError
from tgate_compile._web.site import runtime_files, serving, write_site
from tgate_compile.methods.first_block_cache import FirstBlockCache
from tgate_compile.runtime import BundlePipeline

STEPS, GATE = 12, 5
TYPED = "a small green star on a white background"
#: Timeout in seconds, long enough for a busy machine.
PATIENCE = 240
#: PSNR of 8-bit images that differ only by rounding.
CLOSE = 60.0


@pytest.fixture(scope="module")
def runtime() -> dict[str, Path]:
    try:
        return runtime_files()
    except ConfigurationError as error:
        pytest.skip(f"no ONNX Runtime for browsers: {error}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def site(runtime: dict[str, Path], browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the embedded model as written by the command line, along with latents; return the address."""
    folder = tmp_path_factory.mktemp("web") / "site"
    arguments = ["web", "--out", str(folder), "--steps", str(STEPS), "--gate-step", str(GATE), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["folder"] == str(folder)
    (folder / "latents.bin").write_bytes(latents().numpy().tobytes())
    with serving(folder) as address:
        yield address


@pytest.fixture(scope="module")
def tiny(runtime: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a site with a tiny model."""
    folder = tmp_path_factory.mktemp("tiny") / "site"
    write_site(folder, program(), runtime)
    return folder


@pytest.fixture(autouse=True)
def fresh(browser: Any) -> None:
    show_at(browser, 1280, 900)
    browser.get_log("browser")


def latents() -> torch.Tensor:
    return torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(3))


def of_page(browser: Any, expression: str) -> Any:
    return browser.execute_script(f"return {expression}")


def wait_for(browser: Any, expression: str) -> None:
    began = time.monotonic()
    while not of_page(browser, expression):
        assert time.monotonic() - began < PATIENCE, (expression, text_of(browser, "status"), text_of(browser, "error"))
        time.sleep(0.1)


def text_of(browser: Any, name: str) -> str:
    return str(of_page(browser, f"document.getElementById('{name}').textContent"))


def opened(browser: Any, address: str, query: str = "") -> None:
    browser.get(address + query)
    wait_for(browser, "!document.getElementById('go').disabled || document.getElementById('error').textContent")


def complaints(browser: Any) -> list[str]:
    """Return the browser's console messages, except for the one about the missing GPU."""
    messages = [entry["message"] for entry in browser.get_log("browser")]
    return [message for message in messages if "No available adapters" not in message]


def shown(browser: Any, figure: str) -> np.ndarray[Any, Any]:
    """Return the image in a figure, [height, width, 3], from 0 to 1."""
    width, height, data = of_page(
        browser,
        f"(c => [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]])"
        f"(document.querySelector('#{figure} canvas'))",
    )
    return np.reshape(data, (height, width, 4))[..., :3] / 255


def rounded(image: Any) -> np.ndarray[Any, Any]:
    return np.round(np.asarray(image) * 255) / 255


def in_engine(browser: Any, method: str, argument: Any, **settings: Any) -> Any:
    """Call the page's modules as from a custom page; return the results with pixels as lists."""
    script = """
    const [method, argument, settings, done] = arguments;
    (async () => {
      const { Engine } = await import(new URL("engine.js", document.baseURI));
      const engine = new Engine();
      await engine.open({ bundle: "bundle/", runtime: "runtime/", ...settings });
      const results = [await engine[method](argument)].flat();
      engine.close();
      done(results.map((result) => ({ ...result, pixels: [...result.pixels] })));
    })().catch((error) => done(`${error.name}: ${error.message}`));
    """
    return browser.execute_async_script(script, method, argument, settings)


def image_of(result: Any) -> np.ndarray[Any, Any]:
    return np.reshape(result["pixels"], (result["height"], result["width"], 4))[..., :3] / 255


def expected_images(prompt: str) -> tuple[Any, Any]:
    """Return the images of the pipeline in PyTorch, plain and with T-GATE, [1, height, width, 3]."""
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "np"}
    plain = pipe(prompt, latents=latents(), **call).images
    optimize(pipe, GATE, backend="eager")
    gated = pipe(prompt, latents=latents(), **call).images
    restore(pipe)
    return plain, gated


def test_a_typed_prompt_becomes_the_pipelines_images(site: str, browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    opened(browser, site, "?latents=latents.bin")
    assert of_page(browser, "crossOriginIsolated")
    field = browser.find_element("id", "prompt")
    field.clear()
    field.send_keys(TYPED + Keys.ENTER)
    wait_for(browser, "document.getElementById('go').textContent === 'Stop'")
    wait_for(browser, "document.getElementById('go').textContent === 'Generate'")
    assert text_of(browser, "error") == ""
    assert text_of(browser, "status").startswith("Done: ")
    for figure, expected in zip(("plain", "gated"), expected_images(TYPED), strict=True):
        assert psnr(shown(browser, figure)[None], rounded(expected)) > CLOSE, figure
    strips = [of_page(browser, f"document.querySelector('#{name} .strip').ariaLabel") for name in ("plain", "gated")]
    assert strips == [f"Steps: {'F' * STEPS}", f"Steps: {'F' * GATE + 'p' * (STEPS - GATE)}"]
    kinds = ("plain", "s-f", "s-p")
    bars = [of_page(browser, f"document.querySelectorAll('#chart rect.{kind}').length") for kind in kinds]
    assert bars == [STEPS, GATE, STEPS - GATE]
    assert of_page(browser, "document.querySelector('#chart .gate-word').textContent") == "gate"
    assert of_page(browser, "document.querySelectorAll('#numbers tbody tr').length") == STEPS
    memory = text_of(browser, "memory")
    for part in ("downloaded", "WebAssembly", "172 kB"):
        assert part in memory
    assert of_page(browser, "document.querySelector('#gated canvas').ariaLabel") == f"{TYPED}, with t-gate"
    assert complaints(browser) == []


def test_steps_after_the_gate_take_less_time(site: str, browser: Any) -> None:
    """The two runs take turns, so that they see the same load; one undisturbed attempt out of a few is enough."""
    opened(browser, site)
    calls = [{"prompt": TYPED, "plain": True}, {"prompt": TYPED, "gateStep": 2}]
    ratios = []
    for _ in range(4):
        plain, gated = in_engine(browser, "compare", calls)
        assert gated["strip"] == "FF" + "p" * (STEPS - 2)
        assert sum(step["seconds"] for step in gated["done"]) == pytest.approx(gated["seconds"])
        full, pruned = ([step["seconds"] for step in run["done"][2:]] for run in (plain, gated))
        ratios.append(statistics.median(pruned) / statistics.median(full))
        if ratios[-1] < 0.75:
            return
    pytest.fail(f"steps of the pruned graph took {ratios} of the time of the full graph's")


def test_low_memory(site: str, browser: Any) -> None:
    opened(browser, site)
    call = {"prompt": TYPED, "latents": latents().flatten().tolist()}
    (at_once,) = in_engine(browser, "generate", call)
    (one_by_one,) = in_engine(browser, "generate", call, sequential=True)
    assert one_by_one["pixels"] == at_once["pixels"]
    assert one_by_one["heapBytes"] < at_once["heapBytes"]
    assert one_by_one["openSeconds"] > 0


def test_a_phone(site: str, browser: Any) -> None:
    show_at(browser, 390, 844)
    opened(browser, site)
    browser.find_element("css selector", "#settings summary").click()
    assert of_page(browser, "document.documentElement.scrollWidth") <= 390
    browser.find_element("id", "go").click()
    wait_for(browser, "document.getElementById('status').textContent.startsWith('Done: ')")
    assert of_page(browser, "document.documentElement.scrollWidth") <= 390
    touched = "[...document.querySelectorAll('#go, #prompt, #gate')]"
    sizes = of_page(browser, f"{touched}.map(e => e.getBoundingClientRect().height)")
    assert min(sizes) >= 30
    assert complaints(browser) == []


def test_settings_and_the_gate(site: str, browser: Any) -> None:
    opened(browser, site)
    script = """
    const set = (id, value) => {
      const field = document.getElementById(id);
      field.value = value;
      field.dispatchEvent(new Event("input"));
    };
    set("steps", 6); set("gate", 2);
    return [document.getElementById("plan").ariaLabel, document.getElementById("gate-label").innerText];
    """
    assert browser.execute_script(script) == ["Steps: FFpppp", "Gate after 2 of 6 steps"]
    ideas = of_page(browser, "[...document.querySelectorAll('#ideas button')].map(e => e.textContent)")
    assert len(ideas) == 6
    browser.find_element("css selector", "#ideas li:nth-child(2) button").click()
    assert of_page(browser, "document.getElementById('prompt').value") == ideas[1]
    dark = of_page(browser, "document.documentElement.dataset.theme")
    browser.find_element("id", "theme").click()
    assert of_page(browser, "document.documentElement.dataset.theme") != dark
    unnamed = "[...document.querySelectorAll('input, select')].filter(e => !e.labels.length).map(e => e.id)"
    assert of_page(browser, unnamed) == []


def test_stop(site: str, browser: Any) -> None:
    opened(browser, site)
    browser.find_element("id", "go").click()
    wait_for(browser, "document.getElementById('status').textContent.startsWith('Step ')")
    browser.find_element("id", "go").click()
    wait_for(browser, "document.getElementById('go').textContent === 'Generate'")
    assert text_of(browser, "status") == "Stopped."


def test_other_servers_have_one_thread(tiny: Path, browser: Any) -> None:
    with serving(tiny, isolated=False) as address:
        opened(browser, address)
        assert "does not send the headers" in text_of(browser, "machine")
        (made,) = in_engine(browser, "generate", {"prompt": PROMPT, "latents": noise().flatten().tolist()}, threads=2)
    assert made["threads"] == 1
    expected = BundlePipeline(program(), threads=1)(PROMPT, latents=noise(), output="numpy")
    assert psnr(image_of(made)[None], rounded(expected)[None]) > CLOSE


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("sd3", {"gate_step": 4}),
        *(
            pytest.param(*case, marks=pytest.mark.heavy)
            for case in (
                ("sdxl", {}),
                ("sd", {"gate_step": 5, "sp_interval": 2, "fi_interval": 2, "anchor_weight": 1.0}),
                ("sd3", {"gate_step": None, "guidance_step": 4}),
                ("sd3", {"schedule": FirstBlockCache(0.25)}),
            )
        ),
    ],
    ids=str,
)
def test_other_pipelines_and_schedules(
    name: str, schedule: dict[str, Any], runtime: dict[str, Path], browser: Any, tmp_path: Path
) -> None:
    bundle = program(name, call=(("num_inference_steps", 9),), **schedule)  # enough for all graphs of the schedule
    write_site(tmp_path / "site", bundle, runtime)
    pipe = BundlePipeline(bundle, threads=1)
    given = noise().flatten().tolist()
    with serving(tmp_path / "site") as address:
        opened(browser, address)
        other = {"negativePrompt": "cat", "steps": 11}, {"negative_prompt": "cat", "num_inference_steps": 11}
        for more, own in (({}, {}), other):
            (made,) = in_engine(browser, "generate", {"prompt": PROMPT, "latents": given, **more})
            seen: list[Any] = []
            expected = pipe(PROMPT, latents=noise(), output="numpy", callback=seen.append, **own)
            assert psnr(image_of(made)[None], rounded(expected)[None]) > CLOSE, more
            assert made["strip"] == "".join(step.letter for step in seen)
        browser.find_element("id", "prompt").send_keys(PROMPT)
        browser.find_element("id", "go").click()
        wait_for(browser, "document.getElementById('status').textContent.startsWith('Done')")
        assert not re.search("undefined|NaN", str(of_page(browser, "document.body.innerText")))
    assert complaints(browser) == []


def test_the_error_for_a_bundle_that_the_page_cannot_run(tiny: Path, browser: Any, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "site"))
    path = copy / "bundle" / "manifest.json"
    manifest = json.loads(path.read_text())
    with serving(copy) as address:
        path.write_text(json.dumps(manifest | {"scheduler": {"class_name": "LCMScheduler", "config": {}}}))
        opened(browser, address)
        assert "LCMScheduler, which this page does not support" in text_of(browser, "error")
        assert of_page(browser, "document.getElementById('go').disabled")
        path.write_text(json.dumps(manifest))
        weights = copy / "bundle" / "graphs" / "weights.bin"
        weights.write_bytes(bytes(weights.stat().st_size))
        opened(browser, address)
        browser.find_element("id", "prompt").send_keys("red cat")
        browser.find_element("id", "go").click()
        wait_for(browser, "document.getElementById('error').textContent")
        message = "graphs/weights.bin has been changed: its SHA-256 is not the one in the manifest."
        assert text_of(browser, "error") == message
        assert text_of(browser, "go") == "Generate"
        path.unlink()
        opened(browser, address)
        assert "There is no bundle at" in text_of(browser, "error")


def test_the_minimal_example(tiny: Path, browser: Any) -> None:
    shutil.copy(Path(__file__).parent.parent / "examples" / "web" / "minimal.html", tiny)
    with serving(tiny) as address:
        browser.get(address + "minimal.html")
        wait_for(browser, "document.getElementById('status').textContent === 'FFFFFp'")
    assert complaints(browser) == []
