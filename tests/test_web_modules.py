"""The page's modules in Node.js, against their models: diffusers, transformers, and our schedules."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import random
import unicodedata
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, T5Tokenizer

from tests.javascript import SITE, run_in_node
from tests.programs import noise, pixart_with_text, program, psnr
from tests.test_runtime_schedulers import BETAS, LATENT_DIFFUSION, OPTIONS
from tests.tiny_pipelines import PROMPT, SIZE
from tgate_compile import load_demo_pipeline
from tgate_compile._demo import DEMO_VARIANTS
from tgate_compile._errors import ConfigurationError
from tgate_compile._web.site import runtime_files
from tgate_compile.bundle.denoiser_state import plain_config
from tgate_compile.bundle.manifest import phase_spec
from tgate_compile.bundle.plan_rows import plans_of
from tgate_compile.bundle.read_manifest import shape_at
from tgate_compile.methods.decisions import Decider, Rule
from tgate_compile.methods.first_block_cache import FirstBlockCache
from tgate_compile.methods.fora import Fora
from tgate_compile.methods.method import forecast_weights
from tgate_compile.methods.pab import PAB
from tgate_compile.methods.schedule import Schedule
from tgate_compile.methods.tea_cache import TeaCache
from tgate_compile.methods.tgate import TGate
from tgate_compile.pipeline.caches import Caches
from tgate_compile.runtime import BundlePipeline

SHAPE = (1, 4, 4, 4)
STEPS = (1, 7, 15, 25)
TEXTS = [
    "",
    "a large red circle on a blue background",
    "ΣΑΣ",
    "A small GREEN star,  at the right\tof a white background!",
    "a red square left of a yellow star on a white background " * 3,
    "the cat's toys, it's 3.14 & emoji 🙂; don't (prompt:1.2) a_b-c",
    "An Ünusual, with 日本語, <b>tags</b>, e\u0301 café ﬁ Ⅷ ², İstanbul ΣΑΣ\u0085x\ufeffy \u200d",
    "<|endoftext|> in the middle <|startoftext|>",
    "<|ENDOFTEXT|> a▁b",
    "👩‍👩‍👧 a very long prompt with 日本語 " * 500,
]
#: Files from the package @huggingface/tokenizers, with their SHA-256.
FOREIGN = {
    "tokenizers.min.mjs": "258e46332101335ce8d95aed7745b19ac3b46d37f3e159a89cf894c2ea9b1d3a",
    "tokenizers.LICENSE.txt": "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
}
#: Number of tokens of a prompt.
LENGTH = 77
RUN_SCHEDULERS = """
const { makeScheduler } = await import("./schedulers.js");
return given.map(({ spec, steps, noise, predictions }) => {
  const scheduler = makeScheduler(spec, steps);
  let latents = Float32Array.from(noise, (value) => value * scheduler.initialSigma);
  const seen = predictions.map((prediction, step) => {
    const input = Array.from(scheduler.modelInput(latents, step));
    latents = scheduler.step(Float32Array.from(prediction), step, latents);
    return input;
  });
  return { timesteps: scheduler.timesteps, seen, latents: Array.from(latents) };
});
"""


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "PNDMScheduler"])  # not in the page
def test_schedulers_as_in_diffusers(name: str) -> None:
    """Test each option, beta schedule and prediction type, with the spacings in turn."""
    rng = np.random.default_rng(0)
    cases, expected = [], []
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    configs = [{**LATENT_DIFFUSION, **zero_snr}]
    for number, (betas, options) in enumerate((betas, options) for betas in BETAS for options in OPTIONS[name]):
        for kind in ("epsilon", "sample", "v_prediction"):
            spacing = ("leading", "trailing", "linspace")[(number + len(kind)) % 3]
            more = {"timestep_spacing": spacing, "prediction_type": kind, "steps_offset": number % 2}
            configs.append({**betas, **options, **more})
    for config in configs:
        for steps in STEPS:
            reference = getattr(diffusers, name)(**config)
            reference.set_timesteps(steps)
            if hasattr(reference, "set_begin_index"):
                reference.set_begin_index(0)
            noise, predictions = (rng.standard_normal((count, *SHAPE), dtype=np.float32) for count in (1, steps))
            latents = torch.from_numpy(noise[0]) * reference.init_noise_sigma
            seen = []
            for timestep, prediction in zip(reference.timesteps, predictions, strict=True):
                seen.append(reference.scale_model_input(latents, timestep).numpy())
                latents = reference.step(torch.from_numpy(prediction), timestep, latents).prev_sample
            spec = {"class_name": name, "config": plain_config(dict(reference.config))}
            flat = [array.reshape(len(array), -1).tolist() for array in (noise, predictions)]
            cases.append({"spec": spec, "steps": steps, "noise": flat[0][0], "predictions": flat[1]})
            # diffusers' own float32 rounding of the first latents, which are that large, remains to the end.
            rounding = 1e-6 * float(reference.init_noise_sigma)
            expected.append((config, rounding, reference.timesteps.numpy(), np.stack(seen), latents.numpy()))
    for (config, rounding, timesteps, seen, latents), made in zip(
        expected, run_in_node(RUN_SCHEDULERS, cases), strict=True
    ):
        # With zero terminal SNR sigmas reach 4096, which makes diffusers' own rounding that much larger.
        tolerance = 1e-3 if "rescale_betas_zero_snr" in config else 2e-5
        np.testing.assert_allclose(made["timesteps"], timesteps, rtol=0, atol=1e-3, err_msg=str(config))
        for ours, theirs in ((made["seen"], seen), (made["latents"], latents)):
            difference = np.abs(np.reshape(ours, theirs.shape) - theirs).max()
            assert difference < tolerance * np.abs(theirs).max() + rounding, config


def test_flow_matching_as_in_diffusers() -> None:
    rng = np.random.default_rng(0)
    cases, expected = [], []
    for config in ({}, {"shift": 3.0}):
        for steps in STEPS:
            reference = diffusers.FlowMatchEulerDiscreteScheduler(**config)
            reference.set_timesteps(steps)
            noise, predictions = (rng.standard_normal((count, *SHAPE), dtype=np.float32) for count in (1, steps))
            latents = torch.from_numpy(noise[0])
            for timestep, prediction in zip(reference.timesteps, predictions, strict=True):
                latents = reference.step(torch.from_numpy(prediction), timestep, latents).prev_sample
            spec = {"class_name": type(reference).__name__, "config": plain_config(dict(reference.config))}
            flat = [array.reshape(len(array), -1).tolist() for array in (noise, predictions)]
            cases.append({"spec": spec, "steps": steps, "noise": flat[0][0], "predictions": flat[1]})
            expected.append((reference.timesteps.numpy(), latents.numpy()))
    for (timesteps, latents), made in zip(expected, run_in_node(RUN_SCHEDULERS, cases), strict=True):
        np.testing.assert_allclose(made["timesteps"], timesteps, rtol=0, atol=1e-3)
        np.testing.assert_allclose(np.reshape(made["latents"], latents.shape), latents, rtol=0, atol=1e-5)


def test_tokens_as_in_transformers() -> None:
    """CLIP's byte pairs, whole words, and T5's pieces; `component_tokenizer` writes such files into bundles."""
    across_words = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        ("▁a", -1.0),
        ("b", -1.0),
        ("a▁b", -0.1),
    ]
    tokenizers = [embedded_tokenizer(name) for name in DEMO_VARIANTS]
    tokenizers += [pixart_with_text().tokenizer, T5Tokenizer(vocab=across_words, extra_ids=0), all_bytes()]
    texts = TEXTS + odd_texts(400)
    given, expected = [], []
    for tokenizer in tokenizers:
        data = tokenizer_file(tokenizer)
        normalized = [token | {"normalized": True} for token in data["added_tokens"]]  # as in the checkpoints of CLIP
        for file in (data, data | {"added_tokens": normalized}):
            given.append(file)
            encodings = Tokenizer.from_str(json.dumps(file)).encode_batch(texts)
            expected.append([(one.ids, one.attention_mask, bool(one.overflowing)) for one in encodings])
        of_all = tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True)["input_ids"]
        assert [ids for ids, _, _ in expected[-2]] == of_all
    script = """
    const { Tokenizer } = await import("./tokenizer.js");
    const encoded = (tokenizer) => given.texts.map((text) => tokenizer.encode(text));
    return given.files.map((file) => encoded(new Tokenizer(file)));
    """
    for file, made, tokens in zip(given, run_in_node(script, {"files": given, "texts": texts}), expected, strict=True):
        for text, one, (ids, mask, cut) in zip(texts, made, tokens, strict=True):
            assert one == {"ids": ids, "mask": mask, "cut": cut}, (file["model"]["type"], text)


@pytest.mark.parametrize("side", ["Left", "Right"])
def test_truncation_and_padding_of_either_side(side: str) -> None:
    data = tokenizer_file(embedded_tokenizer("sd"))
    data["truncation"]["direction"] = data["padding"]["direction"] = side
    script = """
    const { Tokenizer } = await import("./tokenizer.js");
    return given.texts.map((text) => new Tokenizer(given.file).encode(text));
    """
    for text, made in zip(TEXTS, run_in_node(script, {"file": data, "texts": TEXTS}), strict=True):
        expected = Tokenizer.from_str(json.dumps(data)).encode(text)
        assert [made["ids"], made["mask"]] == [expected.ids, expected.attention_mask], text


def embedded_tokenizer(name: str) -> Any:
    pipe = load_demo_pipeline(name)
    return pipe.tokenizer or pipe.tokenizer_2


def all_bytes() -> CLIPTokenizer:
    """Return a CLIP tokenizer that knows every byte, so that different texts always have different tokens."""
    letters = sorted(ByteLevel.alphabet())
    merges = [("a", "n</w>"), ("c", "a"), ("ca", "t</w>"), ("Ï", "ĥ</w>"), ("Ï", "ĥ")]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=merges)


def tokenizer_file(tokenizer: Any) -> dict[str, Any]:
    """Return a tokenizer's file in a bundle, for prompts of LENGTH tokens."""
    data: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    padding = {"pad_id": tokenizer.pad_token_id, "pad_token": tokenizer.pad_token, "pad_type_id": 0}
    return data | {
        "truncation": {"direction": "Right", "max_length": LENGTH, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": LENGTH}, "direction": "Right", "pad_to_multiple_of": None, **padding},
    }


def odd_texts(count: int) -> list[str]:
    """Return texts of letters, punctuation and white space from all of Unicode, mixed with special tokens."""
    rng = random.Random(0)
    assigned = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Cs")]
    words = ["<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "<pad>", "</s>", "<unk>", " circle", "n't", "'LL"]
    letters = [chr(code) for code in range(32, 127)] + list("\t\n\x85\xa0\ufeff\u2028\u200d\u3000▁ΣςİÅﬁⅧ²½①e\u0301")
    kinds = (words, letters, letters, letters, assigned)
    return ["".join(rng.choice(rng.choice(kinds)) for _ in range(rng.randint(0, 30))) for _ in range(count)]


SCHEDULES = [
    Schedule(4),
    Schedule(0.4),
    Schedule(99),
    Schedule(9, sp_interval=5, fi_interval=2),
    Schedule(6, sp_interval=3, fi_interval=3, warm_up=1),
    Schedule(6, deepcache_interval=3),
    Schedule(None, deepcache_interval=3),
    Schedule(None, guidance_step=5),
    Schedule(None, guidance_step=0.5, deepcache_interval=2),
    PAB(2, 3, 5, begin=0.1, end=1.0) + Schedule(None, guidance_step=31),  # more phases than lower-case digits
    Schedule.of(Fora(4, forecast=1)),
    Fora(12, warm_up=3, forecast=2) + Schedule(None, guidance_step=0.5),  # more phases than digits
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_schedules_as_here(schedule: Schedule) -> None:
    plans = plans_of(schedule, {})
    assert plans is not None
    cases: list[dict[str, Any]] = []
    expected = []
    for guided in (True, False):
        for steps in (1, 5, 12, 25, 64):
            for gate in (None, 1, 7, 40) if schedule.gate_step is not None else (None,):
                moved = schedule if gate is None else dataclasses.replace(schedule, gate_step=gate)
                plan = moved.plan(steps, guided=guided)
                cases.append({"steps": steps, "guided": guided, **({} if gate is None else {"gateStep": gate})})
                phases = [phase_spec(phase).model_dump() for phase in plan]
                weights = [
                    {kind: list(of_kind) for kind, of_kind in of_step.items()}
                    for of_step in moved.forecast_weights(steps, guided=guided)
                ]
                gate_of = None if gate is not None else min(schedule.gate(steps), steps)
                strip = moved.strip(steps, guided=guided)
                expected.append({"phases": phases, "weights": weights, "strip": strip, "gate": gate_of})
    script = """
    const { gateOf, planOf, stripOf } = await import("./schedule.js");
    const { plans, cases } = given;
    return cases.map(({ steps, guided, gateStep }) => {
      const plan = planOf({ plans }, steps, guided, gateStep);
      const gate = gateStep === undefined ? gateOf({ plans }, steps) : null;
      const of = (key) => plan.map((planned) => planned[key]);
      return { phases: of("phase"), weights: of("weights").map((each) => each ?? {}), strip: stripOf(plan), gate };
    });
    """
    assert run_in_node(script, {"plans": plans.model_dump(), "cases": cases}) == expected


def test_decisions_as_here() -> None:
    """The page decides as `Decider` does, at the threshold too, and weights values as `forecast_weights` does."""
    rng = np.random.default_rng(0)
    rules = [
        Rule(0.5),
        Rule(0.5, at_threshold=True),
        Rule(0.5, most_in_row=2),
        Rule(0.5, at_threshold=True, most_in_row=1, most=3),
        Rule(0.5, accumulates=True, coefficients=(2.0, -1.0, 0.25), since="previous"),
        Rule(0.9, accumulates=True, most=4),
    ]
    # None stands for NaN, and True for a step that is not to be decided.
    measures = [0.5, 0.1, None, 0.2, True, *(float(value) for value in rng.random(20))]
    expected = []
    for rule in rules:
        decider = Decider(rule)
        expected.append(
            [
                decider.computed() if each is True else decider.skips(np.nan if each is None else each)
                for each in measures
            ]
        )
    kept = [([4], 6), ([5, 3], 6), ([9, 7, 2], 12)]
    script = """
    const { Decider, forecastWeights } = await import("./decisions.js");
    const decided = given.rules.map((rule) => {
      const decider = new Decider(rule);
      return given.measures.map((each) => (each === true ? (decider.computed(), null) : decider.skips(each ?? NaN)));
    });
    return { decided, weights: given.kept.map(([steps, step]) => forecastWeights(steps, step)) };
    """
    given = {"rules": [dataclasses.asdict(rule) for rule in rules], "measures": measures, "kept": kept}
    made = run_in_node(script, given)
    assert made["decided"] == expected
    assert all({True, False} <= set(each) for each in expected)
    for weights, (steps, step) in zip(made["weights"], kept, strict=True):
        np.testing.assert_allclose(weights, forecast_weights(steps, step))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_forecasts_as_in_the_pipeline(dtype: str) -> None:
    """The page's denoiser keeps as many values as a forecast needs, even if graphs warm up, and adds them up."""
    rng = np.random.default_rng(0)
    orders, steps = {"ff": 2}, [0, 1, 3]
    values = rng.standard_normal((len(steps), 5)).astype(dtype)
    caches = Caches(orders)
    for step, value in zip(steps, values, strict=True):
        caches.put(("ff", "block"), torch.from_numpy(value), "one", step=step)
    (expected,) = caches.values(None, ["ff"], 5).values()
    spec = {"kind": "ff", "site": "block", "name": "cache", "dtype": dtype}
    emitting = {"phase": {"guided": False, "emit": ["ff"], "merge": [], "reuse": []}, "graph": "full"}
    reusing = {"phase": {"guided": False, "emit": [], "merge": [], "reuse": ["ff"]}, "graph": "reused"}
    weights = {"ff": list(forecast_weights(steps[::-1], 5))}
    of_graph = {"inputs": [], "outputs": [{"name": "out"}], "cache_inputs": [], "cache_outputs": []}
    given = {
        "plan": [emitting, emitting, reusing, emitting, reusing, reusing | {"weights": weights}],
        "manifest": {
            "family": {"order": ["uncond", "cond"]},
            "method": {"forecasts": orders, "keep": "cond"},
            "graphs": {
                "full": of_graph | {"file": "full", "cache_outputs": [spec | {"merged": False}]},
                "reused": of_graph | {"file": "reused", "cache_inputs": [spec]},
            },
        },
        "values": {str(step): value.astype(float).tolist() for step, value in zip(steps, values, strict=True)},
        "dtype": dtype,
    }
    script = """
    const { Denoiser } = await import("./denoiser.js");
    const { tensor } = await import("./session.js");
    const { floats } = await import("./text.js");
    let live = 0, step, seen;
    class Tensor {
      constructor(type, data, dims) { Object.assign(this, { type, data, dims }); live++; }
      dispose() { live--; }
    }
    const runtime = { ort: { Tensor } };
    const run = async (feeds, names) => {
      seen = feeds.cache && Array.from(floats(feeds.cache));
      const made = (name) => tensor(runtime, { dtype: given.dtype }, given.values[name === "cache" ? step : 0], [1, 5]);
      return Object.fromEntries(names.map((name) => [name, made(name)]));
    };
    const denoiser = new Denoiser(given.manifest, runtime, { get: () => ({ run }) }, given.plan, { cond: {} });
    for (step = 0; step < given.plan.length; step++) {
      for (let time = 0; time < 2; time++) await denoiser.warmUp(step, new Float32Array(5), [1, 5], 0);
      await denoiser.run(step, new Float32Array(5), [1, 5], 0, 1);
    }
    const runs = 3 * given.plan.length + 3; // their outputs, and the forecasts of the last step
    const held = live - runs;
    denoiser.release();
    return { seen, held, left: live - runs };
    """
    made = run_in_node(script, given)
    assert (made["held"], made["left"]) == (3, 0)
    np.testing.assert_allclose(made["seen"], expected.float().numpy(), rtol=2e-3 if dtype == "float16" else 1e-5)


def manifest() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((program() / "manifest.json").read_text())
    return data


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (["format"], "other", "not a bundle of tgate_compile"),
        (["schema_version"], 5, "schema version 5, but this page reads versions up to 4"),
        (["schema_version"], None, "schema version null"),
        (["graph_format"], "aoti", 'format "aoti", but browsers run only "onnx"'),
        (["components"], None, "--components all"),
        (["family", "calls"], ["cond", "uncond"], "calls the denoiser once per guidance half"),
        (["method", "schedule", "guidance_similarity"], 0.9, "guidance_similarity"),
        (["method", "plans"], None, "written by an older tgate_compile"),
        (["components", "arguments", "sample"], "magic", 'needs "magic"'),
        (["graphs", "pruned", "cache_inputs", 0, "dtype"], "float8_e5m2", "float8_e5m2, which browsers do not support"),
        (["graphs", "full", "inputs", 0, "shape", 0], 4, "several images at a time"),
        (["graphs", "full", "early_inputs", 0, "dtype"], "bfloat16", "bfloat16, which browsers do not support"),
        (["graphs", "full", "early_inputs", 0, "graph"], "pruned", "from pruned, which does not provide it"),
        (["graphs", "full", "early_inputs", 0, "name"], "other", "takes other from full-table, which does not"),
        (["graphs", "full", "file"], "graphs/other.onnx", "does not list it in"),
        (["scheduler", "class_name"], "LCMScheduler", "LCMScheduler, which this page does not support"),
        (["scheduler", "config", "use_beta_sigmas"], True, "use_beta_sigmas=true, only with false"),
    ],
)
def test_manifests_that_the_page_refuses(where: list[Any], value: Any, message: str) -> None:
    data = manifest()
    inner = data
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    assert message in (refusal(data) or "")


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "https://elsewhere/x", "a/../../b", "a\\b", "a?b", "%2e%2e/x"]
)
def test_files_lie_in_the_bundle(name: str) -> None:
    data = manifest()
    data["files"][name] = data["files"]["graphs/full.onnx"]
    assert "not a plain path in its folder" in (refusal(data) or "")


def refusal(data: dict[str, Any]) -> str | None:
    """Return the page's error for a manifest, or None if it accepts it."""
    script = """
    const { checkManifest } = await import("./manifest.js");
    try {
      checkManifest(given);
      return null;
    } catch (error) {
      return error.name === "BundleError" ? error.message : String(error.stack);
    }
    """
    message: str | None = run_in_node(script, data)
    return message


def test_a_good_manifest_and_its_caches() -> None:
    data = manifest()
    assert refusal(data) is None
    sizes = {name: size["example"] for name, size in data["sizes"].items()}
    specs = data["graphs"]["pruned"]["cache_inputs"]
    expected = sum(4 * int(np.prod(shape_at(spec["shape"], sizes))) for spec in specs)
    script = 'return (await import("./manifest.js")).cacheBytes(given);'
    assert run_in_node(script, data) == expected > 0
    halved = copy.deepcopy(data)
    for spec in halved["graphs"]["pruned"]["cache_inputs"]:
        spec["dtype"] = "float16"
    assert run_in_node(script, halved) == expected / 2


def test_other_tokenizers_are_refused_by_name() -> None:
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": None}
    base = {"added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None, "model": model}
    cases = {
        "byte_fallback": base | {"model": model | {"byte_fallback": True}},
        "Metaspace": base | {"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"}},
        "Precompiled": base | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "ALQCAACEAAA="}},
        "Digits": base | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}]}},
        "WordPiece": base | {"model": {"type": "WordPiece", "vocab": {"a": 0}}},
        "single_word": base | {"added_tokens": [{"id": 1, "content": "b", "single_word": True}]},
        "Longest": base | {"padding": {"strategy": "BatchLongest"}},
        "BertProcessing": base | {"post_processor": {"type": "BertProcessing"}},
    }
    script = """
    const { Tokenizer } = await import("./tokenizer.js");
    const refused = (file) => {
      try {
        new Tokenizer(file);
        return null;
      } catch (error) {
        return `${error.name}: ${error.message}`;
      }
    };
    return given.map(refused);
    """
    for name, message in zip(cases, run_in_node(script, list(cases.values())), strict=True):
        assert message.startswith("BundleError: ")
        assert name in message
        assert "tgate-compile run" in message


def test_half_precision() -> None:
    """Without Float16Array in the browser, the bits are computed in JavaScript."""
    values = np.concatenate(
        [np.random.default_rng(0).standard_normal(500), 10.0 ** np.linspace(-9, 5, 200), [0, -0.0, 65519, 65520, 1e-8]]
    ).astype(np.float32)
    script = """
    const { fromFloat16, toFloat16 } = await import("./float16.js");
    const halves = toFloat16(Float32Array.from(given));
    return [Array.from(halves), Array.from(fromFloat16(halves), (value) => (Number.isFinite(value) ? value : "inf"))];
    """
    bits, back = run_in_node("delete globalThis.Float16Array;" + script, values.tolist())
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    assert bits == expected.view(np.uint16).tolist()
    assert [float(value) for value in back] == expected.astype(float).tolist()


def test_noise_is_normal_and_the_seeds_own() -> None:
    script = """
    const { normalNoise } = await import("./noise.js");
    return [0, 0, 1, 4294967295].map((seed) => Array.from(normalNoise(seed, 20001)));
    """
    first, again, second, last = (np.array(one) for one in run_in_node(script, None))
    assert (first == again).all()
    for values in (first, second, last):
        assert abs(values.mean()) < 0.03
        assert abs(values.std() - 1) < 0.02
        assert abs((np.abs(values) < 1).mean() - 0.6827) < 0.015
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03


def test_the_pages_files_are_plain() -> None:
    """The page uses no framework and no external files, except for a tokenizers library, unmodified from npm."""
    for path in SITE.iterdir():
        text = path.read_text(encoding="utf-8")
        if path.name in FOREIGN:
            assert hashlib.sha256(path.read_bytes()).hexdigest() == FOREIGN[path.name], path
            continue
        assert "http://" not in text.replace("http://www.w3.org/2000/svg", ""), path
        assert "https://" not in text, path


RUN_BUNDLES = """
const { readFile } = await import("node:fs/promises");
const { BundlePipeline } = await import("./pipeline.js");
globalThis.fetch = async (url) => new Response(await readFile(new URL(url))); // Node.js does not fetch files
const made = [];
for (const bundle of given.bundles) {
  for (const sequential of [false, true]) {
    const pipe = await BundlePipeline.open(bundle, { runtime: given.runtime, sequential, from: import.meta.url });
    for (const plain of [false, true]) {
      const call = { prompt: given.prompt, latents: given.latents, plain };
      const { pixels, strip } = await pipe.generate(call);
      made.push({ pixels: Array.from(pixels), strip });
    }
  }
}
return made;
"""


def runtime_folder() -> str:
    """Return the address of ONNX Runtime for browsers."""
    try:
        return f"{next(iter(runtime_files().values())).parent.as_uri()}/"
    except ConfigurationError as error:
        pytest.skip(f"no ONNX Runtime for browsers: {error}")


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("method", "binding_times"),
    [
        (FirstBlockCache(0.25, forecast=1), False),
        (FirstBlockCache(0.25) + TGate(5), True),
        (TeaCache(0.4, coefficients=(1.0, 0.0)), True),
    ],
    ids=str,
)
def test_bundles_that_decide(method: Any, *, binding_times: bool) -> None:
    """The page computes and skips the blocks of the same steps as the runtime in Python, and makes the same image."""
    steps = 8
    bundle = program("sd3", schedule=method, binding_times=binding_times, call=(("num_inference_steps", steps),))
    latents = noise()
    seen: list[Any] = []
    pipe = BundlePipeline(bundle, threads=1)
    expected = pipe(PROMPT, latents=latents, output="numpy", callback=seen.append)
    strip = "".join(step.letter for step in seen)
    assert {"F", "K"} <= set(strip[1:].upper())
    given = {
        "bundles": [f"{bundle.as_uri()}/"],
        "runtime": runtime_folder(),
        "prompt": PROMPT,
        "latents": latents.ravel().tolist(),
    }
    made = run_in_node(RUN_BUNDLES, given)
    assert [each["strip"] for each in made] == [strip, "F" * steps] * 2
    for each in made[::2]:
        image = np.reshape(each["pixels"], (SIZE, SIZE, 4))[..., :3] / 255
        assert psnr(image, np.round(np.asarray(expected) * 255) / 255) > 60


@pytest.mark.heavy
def test_bundles_whose_graphs_are_split_and_whole() -> None:
    """All combinations of split and whole graphs, and of one graph at a time and all of them, make the same images."""
    latents = noise()
    bundles = [program(), program(binding_times=False)]
    given = {
        "bundles": [f"{bundle.as_uri()}/" for bundle in bundles],
        "runtime": runtime_folder(),
        "prompt": PROMPT,
        "latents": latents.ravel().tolist(),
    }
    made = run_in_node(RUN_BUNDLES, given)
    assert [each["strip"] for each in made] == ["FFFppp", "FFFFFF"] * 4
    pipe = BundlePipeline(bundles[1], threads=1)
    for position, gate in enumerate((None, 6)):
        expected = pipe(PROMPT, latents=latents, output="numpy", gate_step=gate)
        for each in made[position::2]:
            image = np.reshape(each["pixels"], (SIZE, SIZE, 4))[..., :3] / 255
            assert psnr(image, np.round(np.asarray(expected) * 255) / 255) > 60
