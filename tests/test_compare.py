"""Comparisons: measurements match direct runs, and the page works in a real browser."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny_pipelines
from tests.tiny_pipelines import pixart
from tgate_compile import UnsupportedModelError, describe, load_demo_pipeline, optimize, restore
from tgate_compile.study.bench.measure import peak_memory, twin_of
from tgate_compile.study.bench.methods import (
    CALIBRATED,
    COMPARED,
    FOR_TRANSFORMERS,
    ComparedMethod,
    caching_methods,
    methods_for,
    steps_at_equal_cost,
    why_not,
)
from tgate_compile.study.comparison.page import page_of
from tgate_compile.study.comparison.result import Comparison, ImageFigures, MethodFigures, ModelFigures, Pictures
from tgate_compile.study.comparison.run import Judge, Task, compare_model, psnr, ssim

STEPS, GATE = 6, 3
PROMPTS = ("red cat", "blue dog")
METHODS = ["plain", "tgate", "tgate_v2", "deepcache", "deepcache_tgate", "adaptive_guidance", "fewer_steps"]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


@pytest.fixture(scope="module")
def compared() -> tuple[Any, ModelFigures, Pictures]:
    """Return a plain pipeline and its comparison."""
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    task = Task(PROMPTS, (0, 7), STEPS, GATE, {"guidance_scale": 5.0})
    return pipe, *compare_model("tiny", pipe, task, judged=False)


def method_of(model: ModelFigures, key: str) -> MethodFigures:
    return next(method for method in model.methods if method.key == key)


def direct(pipe: Any, prompt: int, steps: int = STEPS) -> Image.Image:
    seed = (0, 7)[prompt]
    return pipe(
        PROMPTS[prompt], num_inference_steps=steps, guidance_scale=5.0, generator=torch.Generator().manual_seed(seed)
    ).images[0]


def test_every_method_is_there_with_its_strip(compared: tuple[Any, ModelFigures, Pictures]) -> None:
    _, model, pictures = compared
    assert [method.key for method in model.methods] == METHODS
    strips = {method.key: method.strip for method in model.methods}
    assert strips["plain"] == "FFFFFF"
    assert strips["tgate"] == "FFFppp"
    assert strips["deepcache"] == "FDDFDD"
    assert strips["adaptive_guidance"] == "FFFfff"
    # Its interval begins after step 2, the last one before the gate.
    assert method_of(model, "tgate_v2").why_not == "In 6 steps of this model, it would be identical to T-GATE v1."
    assert set(pictures) == set(METHODS) - {"tgate_v2"}
    assert all(len(images) == 2 for images in pictures.values())
    assert model.guided
    assert model.seeds == (0, 7)


def test_the_images_are_those_of_direct_runs(compared: tuple[Any, ModelFigures, Pictures]) -> None:
    pipe, model, pictures = compared
    fewer = method_of(model, "fewer_steps").steps
    for prompt in range(2):
        assert (pixels(direct(pipe, prompt)) == pixels(pictures["plain"][prompt])).all()
        assert (pixels(direct(pipe, prompt, fewer)) == pixels(pictures["fewer_steps"][prompt])).all()
    optimize(pipe, GATE, backend="eager")
    try:
        for prompt in range(2):
            assert np.abs(pixels(direct(pipe, prompt)).astype(int) - pixels(pictures["tgate"][prompt])).max() <= 1
        variants = {variant.name: variant for variant in describe(pipe).variants}
    finally:
        restore(pipe)
    plain, tgate = model.plain, method_of(model, "tgate")
    assert plain.macs == STEPS * variants["full"].macs
    assert tgate.macs == GATE * variants["full"].macs + (STEPS - GATE) * variants["pruned"].macs
    assert tgate.parameters_at_end == variants["pruned"].parameters < model.parameters
    assert tgate.cache_bytes == variants["pruned"].cache_bytes


def test_fewer_steps_cost_what_tgate_costs(compared: tuple[Any, ModelFigures, Pictures]) -> None:
    _, model, _ = compared
    share = model.cost(method_of(model, "tgate"))
    fewer = method_of(model, "fewer_steps")
    assert share is not None
    assert fewer.steps == round(STEPS * share) < STEPS
    assert model.cost(fewer) == pytest.approx(fewer.steps / STEPS)
    assert len(fewer.step_seconds) == fewer.steps


def test_the_figures_hold_together(compared: tuple[Any, ModelFigures, Pictures]) -> None:
    _, model, pictures = compared
    assert model.plain.drift == 0.0
    assert model.plain.psnr is None
    assert model.speedup(model.plain) == 1.0
    assert len(model.convergence) == STEPS - 1
    for method in model.methods:
        if method.why_not is not None or method is model.plain:
            continue
        assert method.psnr is not None
        assert method.psnr == pytest.approx(
            np.mean([psnr(a, b) for a, b in zip(pictures[method.key], pictures["plain"], strict=True)])
        )
        assert method.drift is not None
        assert method.drift > 0
        assert method.seconds is not None
        assert sum(method.step_seconds) < 1.5 * max(image.seconds for image in method.images)
        assert method.right is None


def test_the_pipeline_stays_plain(compared: tuple[Any, ModelFigures, Pictures]) -> None:
    pipe, _, _ = compared
    assert type(pipe).__call__ is type(tiny_pipelines.stable_diffusion(layout="small")).__call__
    assert "step" not in vars(pipe.scheduler)


def test_a_twin_has_the_same_weights_and_a_separate_denoiser() -> None:
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    twin = twin_of(pipe)
    assert twin.unet is not pipe.unet
    assert [p.data_ptr() for p in twin.unet.parameters()] == [p.data_ptr() for p in pipe.unet.parameters()]
    assert twin.scheduler is not pipe.scheduler
    assert twin.vae is pipe.vae


def test_methods_that_do_not_apply_have_a_reason() -> None:
    methods = methods_for(2)
    transformer = {"transformer": tiny_pipelines.pixart().transformer}
    unet = {"unet": tiny_pipelines.stable_diffusion(layout="small").unet}

    def reasons(denoisers: dict[str, torch.nn.Module], *, guided: bool, steps: int = 20) -> dict[str, str | None]:
        return {m.key: why_not(m, methods, denoisers, steps=steps, guided=guided) for m in methods}

    on_transformer = reasons(transformer, guided=True)
    assert "needs a UNet" in str(on_transformer["deepcache"])
    assert "PixArtTransformer2DModel" in str(on_transformer["deepcache_tgate"])
    assert on_transformer["tgate"] is None
    unguided = reasons(unet, guided=False)
    assert "without guidance" in str(unguided["adaptive_guidance"])
    assert unguided["deepcache"] is None
    never = reasons(unet, guided=True, steps=2)
    assert never["tgate"] == "In 2 steps of this model, it would be identical to plain."
    assert steps_at_equal_cost(25, 0.684) == (17, None)
    steps, why = steps_at_equal_cost(4, 0.96)
    assert (steps, "4% of the operations" in str(why)) == (4, True)
    assert steps_at_equal_cost(4, None)[1] is not None


def test_a_method_that_fails_is_listed() -> None:
    pipe = tiny_pipelines.latent_consistency()
    task = Task(("red cat",), (0,), 2, 1, {"guidance_scale": 5.0}, backend="abacus")
    model, pictures = compare_model("lcm", pipe, task, judged=False)
    assert set(pictures) == {"plain"}
    assert method_of(model, "tgate").why_not == (
        'ConfigurationError: backend must be one of "inductor", "onnxruntime", "openvino", "tensorrt", "eager" or '
        "\"auto\", but got 'abacus'."
    )
    assert "unknown" in str(method_of(model, "fewer_steps").why_not)
    page = page_of(Comparison("command", {"device": "cpu"}, (model,), {"lcm": pictures}))
    failed = [method for method in model.methods if "abacus" in str(method.why_not)]
    assert len(failed) == 2
    assert page.count("but got &#39;abacus&#39;.") == len(failed)


@pytest.mark.heavy
def test_methods_of_a_transformer() -> None:
    """Those with numbers of the model are calibrated, and decisions are shown as they were made."""
    pipe = load_demo_pipeline("sd3")
    pipe.set_progress_bar_config(disable=True)
    chosen = ("magcache", "teacache", "first_block_cache", "fewer_steps")
    task = Task(("a red circle",), (0,), STEPS, GATE, {"guidance_scale": 4.5, "max_sequence_length": 0}, methods=chosen)
    model, pictures = compare_model("sd3", pipe, task, judged=False)
    found = {method.key: method for method in model.methods}
    assert list(found) == ["plain", "magcache", "first_block_cache", "teacache", "fewer_steps"]
    assert set(pictures) == {key for key, method in found.items() if method.why_not is None}
    assert "ratios of 6 steps" in found["magcache"].schedule
    assert "coefficients" in found["teacache"].schedule
    assert set(found["teacache"].strip) == {"F", "K"}
    assert not {"B", "C"} & set(found["first_block_cache"].strip)
    assert found["fewer_steps"].steps == STEPS // 2  # there is no T-GATE to compare it with


def test_which_methods_are_compared() -> None:
    transformer = pixart().transformer
    known = {method.key for method in (*methods_for(GATE), *caching_methods(GATE, transformer))}
    assert known == {"plain", *COMPARED}
    assert set(CALIBRATED) <= known
    assert set(FOR_TRANSFORMERS) <= known
    methods = caching_methods(GATE, transformer)
    reasons = {m.key: why_not(m, methods, {"transformer": transformer}, steps=20, guided=True) for m in methods}
    assert set(reasons.values()) == {None}  # methods with the same letters in their strips may differ


def test_a_pipeline_without_images_is_refused() -> None:
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    task = Task(("red cat",), (0,), 2, 1, {"output_type": "latent"})
    with pytest.raises(UnsupportedModelError, match="returns a Tensor"):
        compare_model("latents", pipe, task, judged=False)


def test_likeness() -> None:
    rng = np.random.default_rng(0)
    one = Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
    other = Image.fromarray((np.asarray(one) // 2).astype(np.uint8))
    assert psnr(one, one) is None
    error = np.mean((np.asarray(one) / 255 - np.asarray(other) / 255) ** 2)
    assert psnr(one, other) == pytest.approx(-10 * math.log10(error))
    pytest.importorskip("torchmetrics")
    assert ssim(one, one) == pytest.approx(1.0)
    assert ssim(one, other) < 0.9  # type: ignore[operator]


def test_the_judge_knows_captions_only() -> None:
    caption = "a large red circle on a blue background"
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    image = pipe(caption, num_inference_steps=8, generator=torch.Generator().manual_seed(0)).images[0]
    judge = Judge()
    assert judge.is_right(image, caption) is True
    assert judge.is_right(image, "a large red circle on a green background") is False
    assert judge.is_right(image, "a red fox") is None
    assert judge.is_right(image.resize((32, 32)), caption) is None


def test_the_peak_of_memory_is_seen() -> None:
    with peak_memory(torch.device("cpu")) as peak:
        tensor = torch.ones(16_000_000)  # 64 MB
        del tensor
    if peak.added is None:
        pytest.skip("the peak of the resident set cannot be reset here")
    assert 60e6 < peak.added < 90e6
    assert peak.total is not None
    assert peak.total > peak.added


# The page, in a real browser.


def made_up(
    names: Sequence[str] = ("first", "second model"), compared: Sequence[ComparedMethod] = methods_for(GATE)
) -> Comparison:
    """Compare plain-coloured images, two prompts each; the last method does not apply to the first model."""
    models, pictures = [], {}
    for name in names:
        methods = []
        for index, method in enumerate(compared):
            absent = name == names[0] and index == len(compared) - 1
            image = ImageFigures(0.1, 20.0 + index if index else None, 0.9, 0.1 * index, index != 2)
            figures = MethodFigures(method.key, method.title, "", STEPS, why_not="It <cannot> & will not.")
            if not absent:
                strip = "F" * STEPS if method.schedule is None else method.schedule.strip(STEPS)
                figures = MethodFigures(
                    method.key, method.title, "a schedule", STEPS, strip, None, 1.0, 0.2 - 0.01 * index,
                    (0.02,) * STEPS, 1e9 - 4e7 * index, 1_000_000, 2_000_000, 3_000_000, (image, image),
                )  # fmt: skip
            methods.append(figures)
        setting = dict.fromkeys(("pipeline", "denoiser", "scheduler", "device", "dtype", "guidance scale"), "x")
        models.append(
            ModelFigures(
                name, None, setting | {"backend": "eager"}, STEPS, GATE, True, 2_000_000,
                ('a "red" <cat>', "blue dog"), (0, 1), (0.5, 0.2, 0.1, 0.1, 0.1), tuple(methods),
            )
        )  # fmt: skip
        pictures[name] = {
            method.key: [Image.new("RGB", (32, 32), (12 * index, 255 * prompt, 90)) for prompt in range(2)]
            for index, method in enumerate(methods)
            if method.why_not is None
        }
    models.append(ModelFigures("broken", error="OSError: it is <not> there"))
    return Comparison("tgate-compile compare", {"device": "cpu", "torch": "2"}, tuple(models), pictures)


def test_the_page_needs_nothing_else() -> None:
    page = page_of(made_up())
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page.replace('xlink:href="#', 'href="#'))
    assert "http" not in re.sub(r"http://www\.w3\.org/\S+", "", page)
    assert "It &lt;cannot&gt; &amp; will not." in page
    assert "it is &lt;not&gt; there" in page
    assert "<cat>" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert page.count("data:image/webp;base64,") == 2 * (6 + 7)


def test_the_figures_are_plain_data(compared: tuple[Any, ModelFigures, Pictures]) -> None:
    _, model, pictures = compared
    assert model.plain.run_seconds
    # Without the times of the runs, a busy machine cannot make them unreliable.
    model = dataclasses.replace(
        model, methods=tuple(dataclasses.replace(method, run_seconds=()) for method in model.methods)
    )
    data = Comparison("command", {"device": "cpu"}, (model,), {"tiny": pictures}).as_dict()
    again = json.loads(json.dumps(data, allow_nan=False))
    assert again["models"][0]["methods"][0]["speedup"] == 1.0
    assert again["models"][0]["methods"][1]["drift"] == method_of(model, "tgate").drift
    page = page_of(Comparison("command", {"device": "cpu"}, (model,), {"tiny": pictures}))
    assert page.count('class="shot"') == 12


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start headless Chromium and collect its console messages."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: no browser to look with")
    from selenium.webdriver.chrome.service import Service

    chromium = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("there is no Chromium with its chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run",
                     "disable-background-networking", "disable-component-update", "disable-sync",
                     "force-prefers-reduced-motion"):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    yield started
    started.quit()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Any:
    """Open the page in the browser."""
    path = tmp_path / "page.html"
    path.write_text(page_of(made_up()), encoding="utf-8")
    show_at(browser, 1280, 900)
    browser.get(path.as_uri())
    return browser


def show_at(browser: Any, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def of_page(browser: Any, expression: str) -> Any:
    return browser.execute_script(f"return {expression}")


def press(browser: Any, key: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    ActionChains(browser).send_keys(getattr(Keys, key)).perform()


def test_the_page_loads_without_a_complaint(opened: Any) -> None:
    assert of_page(opened, "[...document.images].filter(i => i.hasAttribute('src')).every(i => i.naturalWidth === 32)")
    assert of_page(opened, "document.querySelectorAll('.plots svg').length") == 6
    assert of_page(opened, "getComputedStyle(document.querySelector('.plots svg text')).fill") != "rgb(0, 0, 0)"
    assert opened.get_log("browser") == []


def test_an_image_is_enlarged_and_compared_under_a_slider(opened: Any) -> None:
    from selenium.webdriver.common.by import By

    shots = opened.find_elements(By.CSS_SELECTOR, ".shot")
    shots[2].click()
    assert of_page(opened, "document.getElementById('viewer').open")
    assert of_page(
        opened, "document.getElementById('viewer-left').src === document.querySelectorAll('.shot img')[0].src"
    )
    assert of_page(
        opened, "document.getElementById('viewer-right').src === document.querySelectorAll('.shot img')[2].src"
    )
    assert of_page(opened, "document.getElementById('stage').getBoundingClientRect().width") > 400
    clip = "getComputedStyle(document.getElementById('viewer-left')).clipPath"
    middle = of_page(opened, clip)
    from selenium.webdriver.common.action_chains import ActionChains

    stage = opened.find_element(By.ID, "stage")
    # Drag the handle from the middle by a quarter of the width to the right.
    ActionChains(opened).move_to_element(stage).click_and_hold().move_by_offset(
        int(stage.size["width"] / 4), 0
    ).release().perform()
    assert 70 <= int(of_page(opened, "document.getElementById('slider').value")) <= 80
    assert of_page(opened, clip) != middle
    assert opened.get_log("browser") == []


def test_the_keyboard_suffices(opened: Any) -> None:
    right = "document.getElementById('right-method').selectedIndex"
    opened.execute_script("document.querySelectorAll('.shot')[1].focus()")
    press(opened, "ENTER")
    assert of_page(opened, right) == 1
    press(opened, "ARROW_RIGHT")
    assert of_page(opened, right) == 2
    press(opened, "ARROW_LEFT")
    press(opened, "ARROW_LEFT")
    press(opened, "ARROW_LEFT")
    assert of_page(opened, right) == 5  # wraps around to the last of six
    press(opened, "ARROW_DOWN")
    assert of_page(opened, "document.getElementById('viewer-prompt').textContent") == "first: blue dog"
    press(opened, "ESCAPE")
    assert not of_page(opened, "document.getElementById('viewer').open")
    assert of_page(opened, "document.activeElement.dataset.prompt + document.activeElement.dataset.method") == "15"


def test_the_page_can_be_read_on_a_phone(opened: Any) -> None:
    from selenium.webdriver.common.by import By

    show_at(opened, 390, 844)
    assert of_page(opened, "document.documentElement.scrollWidth") <= 390
    assert of_page(opened, "Math.min(...[...document.querySelectorAll('.shot')].map(s => s.clientWidth))") >= 80
    texts = "[...document.querySelectorAll('p, td, th, li, small, figcaption, .why')]"
    assert of_page(opened, f"Math.min(...{texts}.map(text => parseFloat(getComputedStyle(text).fontSize)))") >= 10.5
    opened.find_elements(By.CSS_SELECTOR, ".shot")[1].click()
    box = of_page(opened, "document.getElementById('viewer').getBoundingClientRect().toJSON()")
    assert min(box["left"], box["top"]) >= 0
    assert box["right"] <= 390
    assert box["bottom"] <= 844


@pytest.fixture
def crowded(browser: Any, tmp_path: Path) -> Any:
    """Open a page with all methods in the browser."""
    found = {method.key: method for method in (*methods_for(GATE), *caching_methods(GATE, pixart().transformer))}
    path = tmp_path / "page.html"
    path.write_text(page_of(made_up(compared=[found[key] for key in ("plain", *COMPARED)])), encoding="utf-8")
    show_at(browser, 1280, 900)
    browser.get(path.as_uri())
    return browser


def test_a_page_with_every_method_can_be_read(crowded: Any) -> None:
    from selenium.webdriver.common.by import By

    assert len(COMPARED) == 17
    shots = "[...document.querySelectorAll('.shots')[1].querySelectorAll('.shot')].map(shot => shot.clientWidth)"
    assert len(of_page(crowded, shots)) == 17  # of the first model, for which the last method does not apply
    marks = (
        "[...document.querySelectorAll('.overview .dot')].map(d => [getComputedStyle(d).backgroundColor, d.className])"
    )
    assert len({tuple(mark) for mark in of_page(crowded, marks)}) == 18
    steps = (
        "[...document.querySelectorAll('.strip i')].map(i => [i.className.slice(2, 3), getComputedStyle(i).background])"
    )
    colours = dict(of_page(crowded, steps))
    assert len({colours[letter] for letter in "fpdhkb"}) == 6
    for width, least in ((1280, 100), (390, 80)):
        show_at(crowded, width, 844)
        assert of_page(crowded, "document.documentElement.scrollWidth") <= width
        assert min(of_page(crowded, shots)) >= least
    # A method can be seen alone in the plots.
    button = crowded.find_elements(By.CSS_SELECTOR, ".of-plots button")[3]
    crowded.execute_script("arguments[0].click()", button)
    shown = "[...document.querySelectorAll('.plots')[0].querySelectorAll('g[id*=\"-of-\"]')]"
    lit = of_page(crowded, f"{shown}.filter(g => getComputedStyle(g).opacity === '1').map(g => g.id)")
    assert lit
    assert all("-of-3-" in name for name in lit)
    crowded.execute_script("arguments[0].click()", button)
    assert of_page(crowded, f"{shown}.every(g => getComputedStyle(g).opacity === '1')")
    assert crowded.get_log("browser") == []


def test_light_and_dark(opened: Any) -> None:
    from selenium.webdriver.common.by import By

    paper = "getComputedStyle(document.body).backgroundColor"
    light = of_page(opened, paper)
    opened.find_element(By.ID, "theme").click()
    assert of_page(opened, paper) != light
    assert of_page(opened, "document.documentElement.dataset.theme") in ("dark", "light")


def test_a_comparison_of_one_broken_model_is_a_page() -> None:
    whole = made_up()
    page = page_of(dataclasses.replace(whole, models=whole.models[-1:], pictures={}))
    assert "it is &lt;not&gt; there" in page
