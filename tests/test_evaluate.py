"""`evaluate`: correct numbers, the pipeline's own images, and continuing after it was killed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny_pipelines
from tests.denoiser_cases import CASES
from tests.hook_reference import hook_reference
from tgate_compile import (
    ConfigurationError,
    Evaluation,
    Schedule,
    UnsupportedModelError,
    describe,
    evaluate,
    load_demo_pipeline,
    optimize,
    restore,
)
from tgate_compile._demo.attribute_reader import AttributeReader
from tgate_compile.methods.method import Phase
from tgate_compile.study.evaluation.features import (
    Features,
    Inception,
    Statistics,
    frechet_distance,
    inception_features,
    pixels_of,
    reference_statistics,
)
from tgate_compile.study.evaluation.images import Share, contenders_of, cost_of
from tgate_compile.study.evaluation.measure import Lpips, drawings, right

STEPS = 4
PROMPTS = ["red cat", "blue dog"]
GUIDANCE = {"guidance_scale": 5.0}
SCHEDULES = {"early": Schedule(2), "never gated": Schedule(50), "fewer": 3}

# Results of pytorch-fid 0.3.0 and lpips 0.1.4 for the weights and pixels of the tests below.
INCEPTION_FIRST = [0.0003431540390010923, 0.9261507391929626, 0.0003807056345976889, 0.16306321322917938]
INCEPTION_NORM = 15.620994567871094
LPIPS = 0.10375969856977463


def drawn(pipe: Any, prompt: int, seed: int = 0, **call: Any) -> Any:
    """Return an image as `evaluate` generates it."""
    generator = torch.Generator().manual_seed(seed * 1_000_000 + prompt)
    return pipe(PROMPTS[prompt], generator=generator, **{"num_inference_steps": STEPS, **GUIDANCE, **call}).images[0]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Evaluation]:
    """Return a plain pipeline and its evaluation."""
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    folder = tmp_path_factory.mktemp("evaluation") / "new" / "folder"
    return pipe, evaluate(pipe, SCHEDULES, PROMPTS, folder, seeds=(0, 3), num_inference_steps=STEPS, call=GUIDANCE)


def files_of(folder: Path) -> dict[str, float]:
    """Return the modification time of each image."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("images/*/*.png")}


def test_images_are_those_of_the_pipeline_with_all_that_made_them(evaluated: tuple[Any, Evaluation]) -> None:
    pipe, evaluation = evaluated
    folder = evaluation.folder
    assert len(files_of(folder)) == 4 * 4
    with Image.open(folder / "images" / "plain" / "00001-3.png") as image:
        assert image.tobytes() == drawn(pipe, 1, 3).tobytes()
        texts = image.text
    assert texts["prompt"] == "blue dog"
    assert (texts["seed"], texts["contender"], texts["strip"]) == ("3000001", "plain", "FFFF")
    with Image.open(folder / "images" / "fewer" / "00000-0.png") as image:
        assert image.tobytes() == drawn(pipe, 0, num_inference_steps=3).tobytes()
    with hook_reference(pipe, 2):
        gated = np.asarray(drawn(pipe, 0)).astype(int)
    with Image.open(folder / "images" / "early" / "00000-0.png") as image:
        assert np.abs(np.asarray(image).astype(int) - gated).max() <= 1
        assert image.text["strip"] == "FFpp"
    assert not list(folder.glob("**/*.part"))
    assert not any(hasattr(pipe, name) for name in ("_tgate_compile",))
    assert "step" not in vars(pipe.scheduler)


def test_likeness_is_that_of_the_images(evaluated: tuple[Any, Evaluation]) -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    pipe, evaluation = evaluated
    assert [row.label for row in evaluation.rows] == ["plain", "early", "never gated", "fewer"]
    for label in ("plain", "never gated"):
        measures = evaluation[label].measures
        assert (measures["identical"], measures["psnr"], measures["ssim"], measures["drift"]) == (4, None, 1.0, 0.0)
    early = evaluation["early"].measures
    pairs = [
        [pixels_of([Image.open(evaluation.folder / "images" / c / f"{p:05d}-{s}.png")]) for c in ("early", "plain")]
        for p in (0, 1)
        for s in (0, 3)
    ]
    psnr = [peak_signal_noise_ratio(a, b, data_range=1.0).item() for a, b in pairs]
    ssim = [structural_similarity_index_measure(a, b, data_range=1.0).item() for a, b in pairs]
    assert early["psnr"] == pytest.approx(sum(psnr) / 4, rel=1e-5)
    assert early["psnr_se"] == pytest.approx(torch.tensor(psnr).std().item() / 2, rel=1e-3)
    assert early["ssim"] == pytest.approx(sum(ssim) / 4, rel=1e-5)
    drifts = []
    for prompt in (0, 1):
        for seed in (0, 3):
            plain = drawn(pipe, prompt, seed, output_type="latent")
            with hook_reference(pipe, 2):
                drifts.append(((drawn(pipe, prompt, seed, output_type="latent") - plain).norm() / plain.norm()).item())
    assert early["drift"] == pytest.approx(sum(drifts) / 4, rel=1e-3)
    assert early["drift_worst"] == pytest.approx(max(drifts), rel=1e-3)


def test_cost_is_that_of_the_graphs(evaluated: tuple[Any, Evaluation]) -> None:
    pipe, evaluation = evaluated
    optimize(pipe, 2, backend="eager")
    drawn(pipe, 0)
    macs = {variant.name: variant.macs for variant in describe(pipe).variants}
    restore(pipe)
    assert evaluation["early"].measures["cost"] == pytest.approx((macs["full"] + macs["pruned"]) / (2 * macs["full"]))
    assert evaluation["fewer"].measures["cost"] == pytest.approx(3 / 4)
    assert evaluation["never gated"].measures["cost"] == 1.0
    assert evaluation["early"].strips == {"FFpp": 4}
    both, half = Phase(True), Phase(False, reuse=frozenset({"cross"}))
    per_row = {"full": 10.0, "pruned": 4.0}
    assert cost_of([both, half], per_row, separate=False) == (24.0, 40.0)
    assert cost_of([both, both, half], per_row, separate=True) == (24.0, 40.0)
    assert cost_of([Phase(False), half], per_row, separate=False) == (14.0, 20.0)


def test_missing_measures_are_listed(evaluated: tuple[Any, Evaluation]) -> None:
    _, evaluation = evaluated
    assert set(evaluation.not_measured) == {"lpips", "clip_score", "fid", "fid_to_plain", "accuracy"}
    assert "pt_inception-2015-12-05-6726825d.pth" in evaluation.not_measured["fid"]
    for words in ("early", "PSNR", "not measured: lpips: its weights are not available"):
        assert words in str(evaluation)


def test_the_protocol_records_everything_that_the_numbers_depend_on(evaluated: tuple[Any, Evaluation]) -> None:
    pipe, evaluation = evaluated
    protocol = evaluation.protocol
    assert protocol["prompts"] == PROMPTS
    assert (protocol["seeds"], protocol["num_inference_steps"], protocol["images"]) == ([0, 3], STEPS, 4)
    assert protocol["call"] == GUIDANCE
    assert protocol["scheduler"] == "DDIMScheduler"
    assert protocol["scheduler_config"]["prediction_type"] == pipe.scheduler.config.prediction_type
    assert protocol["image_size"] == [16, 16]
    assert set(protocol["weights"]) == {"unet", "vae", "text_encoder"}
    for name in ("pipeline", "denoiser", "dtype", "device", "torch", "diffusers", "instruments"):
        assert name in protocol
    data = json.loads((evaluation.folder / "results.json").read_text())
    assert data["rows"][1]["measures"] == evaluation["early"].measures
    assert Evaluation.from_dict(data, evaluation.folder) == evaluation


def test_the_plot(evaluated: tuple[Any, Evaluation], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    evaluated[1].plot(tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "never gated" in text
    assert "PSNR to plain" in text
    evaluated[1].plot(tmp_path / "a.png")


def test_existing_images_are_not_made_again(evaluated: tuple[Any, Evaluation]) -> None:
    _, evaluation = evaluated
    folder = evaluation.folder
    before = files_of(folder)
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    arguments: dict[str, Any] = {"seeds": (0, 3), "num_inference_steps": STEPS, "call": GUIDANCE}
    pipe.unet.forward = None  # so that nothing can run
    again = evaluate(pipe, SCHEDULES, PROMPTS, folder, **arguments)
    assert again.as_dict() == evaluation.as_dict()
    assert files_of(folder) == before

    del pipe.unet.forward
    lost = folder / "images" / "early" / "00001-0.png"
    content = lost.read_bytes()
    lost.unlink()
    (folder / "results.json").unlink()
    made: list[str] = []
    again = evaluate(
        pipe, SCHEDULES, PROMPTS, folder, **arguments, progress=lambda done, total, what: made.append(what)
    )
    assert made == ["early", *(f"measured {row.label}" for row in evaluation.rows)]
    assert lost.read_bytes() == content
    assert again.as_dict() == evaluation.as_dict()
    assert {name: at for name, at in files_of(folder).items() if "early/00001-0" not in name} == {
        name: at for name, at in before.items() if "early/00001-0" not in name
    }


def test_another_request_needs_another_folder(evaluated: tuple[Any, Evaluation]) -> None:
    pipe, evaluation = evaluated
    arguments: dict[str, Any] = {"seeds": (0, 3), "num_inference_steps": STEPS, "call": GUIDANCE}
    for change, shown in (
        ({"seeds": (0, 4)}, "seeds"),
        ({"num_inference_steps": 5}, "num_inference_steps"),
        ({"call": {"guidance_scale": 6.0}}, r"call.guidance_scale was 5.0, and is now 6.0"),
        ({"batch_size": 2}, "batch_size"),
    ):
        with pytest.raises(ConfigurationError, match=shown):
            evaluate(pipe, SCHEDULES, PROMPTS, evaluation.folder, **{**arguments, **change})
    with pytest.raises(ConfigurationError, match="prompts"):
        evaluate(pipe, SCHEDULES, ["red cat", "blue cat"], evaluation.folder, **arguments)
    with pytest.raises(ConfigurationError, match=r"early.schedule.gate_step"):
        evaluate(pipe, {"early": Schedule(3)}, PROMPTS, evaluation.folder, **arguments)
    other = tiny_pipelines.stable_diffusion(layout="small")
    other.unet.conv_out.bias.add_(0.1)
    with pytest.raises(ConfigurationError, match=r"weights.unet"):
        evaluate(other, SCHEDULES, PROMPTS, evaluation.folder, **arguments)
    (evaluation.folder / "request.json").rename(evaluation.folder / "kept.json")
    (evaluation.folder / "request.json").write_text("[]")
    with pytest.raises(ConfigurationError, match="does not describe"):
        evaluate(pipe, SCHEDULES, PROMPTS, evaluation.folder, **arguments)
    (evaluation.folder / "kept.json").replace(evaluation.folder / "request.json")


def test_more_schedules_join_those_that_are_there(tmp_path: Path) -> None:
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    arguments: dict[str, Any] = {"num_inference_steps": STEPS, "call": GUIDANCE, "keep_latents": False}
    first = evaluate(pipe, [Schedule(2)], PROMPTS, tmp_path, **arguments)
    before = files_of(tmp_path)
    second = evaluate(pipe, [Schedule(3), 3], PROMPTS, tmp_path, **arguments)
    assert [row.label for row in second.rows] == ["plain", "gate step 3", "3 steps"]
    assert {name: at for name, at in files_of(tmp_path).items() if name in before} == before
    assert second["plain"] == first["plain"]
    assert "drift" not in second["plain"].measures
    assert "not kept" in second.not_measured["drift"]
    assert not (tmp_path / "latents").exists()


def test_schedulers_that_draw_noise_draw_the_images_own(tmp_path: Path) -> None:
    pipe = tiny_pipelines.latent_consistency()
    evaluate(pipe, [Schedule(2)], PROMPTS[:1], tmp_path, num_inference_steps=STEPS, call=GUIDANCE)
    with Image.open(tmp_path / "images" / "plain" / "00000-0.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(drawn(pipe, 0)))


def test_batches_draw_the_same_images(tmp_path: Path) -> None:
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    prompts = ["red cat", "blue dog", "old tree"]
    call = {**GUIDANCE, "negative_prompt": "fog"}
    evaluation = evaluate(pipe, [Schedule(2)], prompts, tmp_path, num_inference_steps=STEPS, call=call, batch_size=2)
    with Image.open(tmp_path / "images" / "plain" / "00001-0.png") as image:
        alone = np.asarray(drawn(pipe, 1, negative_prompt="fog")).astype(int)
        assert np.abs(np.asarray(image).astype(int) - alone).max() <= 1
    optimize(pipe, 2, backend="eager")
    drawn(pipe, 0)
    macs = {variant.name: variant.macs for variant in describe(pipe).variants}
    assert evaluation["gate step 2"].measures["cost"] == pytest.approx(
        (macs["full"] + macs["pruned"]) / (2 * macs["full"])
    )  # although the last batch has only one image


# Frechet distances, Inception, LPIPS, CLIP.


def test_the_frechet_distance() -> None:
    made = torch.Generator().manual_seed(0)
    a = torch.randn(400, 6, generator=made, dtype=torch.float64)
    b = a @ torch.randn(6, 6, generator=made, dtype=torch.float64) + 0.5
    of_a, of_b = Statistics.of(a), Statistics.of(b)
    assert frechet_distance(of_a, of_a) == pytest.approx(0.0, abs=1e-9)
    product = np.linalg.eigvals(np.cov(a.numpy().T) @ np.cov(b.numpy().T))
    shift = a.numpy().mean(0) - b.numpy().mean(0)
    direct = shift @ shift + np.trace(np.cov(a.numpy().T) + np.cov(b.numpy().T)) - 2 * np.sqrt(product).real.sum()
    assert frechet_distance(of_a, of_b) == pytest.approx(direct, rel=1e-9)
    assert frechet_distance(of_b, of_a) == pytest.approx(direct, rel=1e-9)
    moved = dataclasses.replace(of_a, mean=of_a.mean + 2.0)
    assert frechet_distance(of_a, moved) == pytest.approx(6 * 4.0)
    few = Statistics.of(a[:3])  # a singular covariance
    assert math.isfinite(frechet_distance(few, of_b))


def test_statistics_files_are_pytorch_fids(tmp_path: Path) -> None:
    of = Statistics.of(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), {"folder": "real"})
    of.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["mu"], of.mean.numpy())
        assert np.array_equal(file["sigma"], of.covariance.numpy())
    found = Statistics.load(tmp_path / "a.npz")
    assert (found.count, found.about) == (20, {"folder": "real"})
    assert frechet_distance(found, of) == pytest.approx(0.0, abs=1e-9)
    np.savez(tmp_path / "b.npz", mu=of.mean.numpy(), sigma=of.covariance.numpy())  # as pytorch-fid does
    assert Statistics.load(tmp_path / "b.npz").count is None
    np.savez(tmp_path / "c.npz", mu=of.mean.numpy())
    (tmp_path / "d.npz").write_text("no")
    for name in ("c.npz", "d.npz", "none.npz"):
        with pytest.raises(ConfigurationError, match=name):
            Statistics.load(tmp_path / name)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write seeded weights to a file like pytorch-fid's, including the classifier."""
    network = Inception()
    made = torch.Generator().manual_seed(5)

    def normal(value: torch.Tensor) -> torch.Tensor:
        return torch.randn(value.shape, generator=made)

    with torch.no_grad():
        for name, value in network.named_parameters():
            if value.ndim > 1:
                value.copy_(normal(value) * (2 / max(1, value[0].numel())) ** 0.5)
            else:
                value.copy_(1 + 0.1 * normal(value) if name.endswith("weight") else 0.1 * normal(value))
        for name, value in network.named_buffers():
            if "running_mean" in name:
                value.copy_(0.1 * normal(value))
            if "running_var" in name:
                value.copy_(1 + 0.2 * torch.rand(value.shape, generator=made))
    path = tmp_path_factory.mktemp("weights") / "pt_inception-2015-12-05-6726825d.pth"
    classifier = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save({**network.state_dict(), **classifier}, path)
    return path


def test_inception_is_pytorch_fids(inception_weights: Path) -> None:
    features = inception_features(inception_weights, 64, torch.device("cpu"))
    made = torch.Generator().manual_seed(9)
    image = torch.rand(1, 3, 64, 64, generator=made)
    found = features.extract(image)[0]
    assert found.shape == (2048,)
    assert found[:4].tolist() == pytest.approx(INCEPTION_FIRST, rel=1e-4)
    assert found.norm().item() == pytest.approx(INCEPTION_NORM, rel=1e-4)


@pytest.mark.heavy
def test_fid_of_images_and_its_cache(inception_weights: Path, tmp_path: Path) -> None:
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    real = tmp_path / "real" / "deep"
    real.mkdir(parents=True)
    for index in range(3):
        noise = np.random.default_rng(index).integers(0, 255, (20, 30, 3), np.uint8)
        Image.fromarray(noise).save(real / f"{index}.jpg")
    arguments: dict[str, Any] = {"num_inference_steps": 2, "call": GUIDANCE, "fid_weights": inception_weights}
    with_reference = {**arguments, "fid_reference": tmp_path / "real", "fid_size": 32}
    evaluation = evaluate(pipe, [Schedule(1)], PROMPTS, tmp_path / "a", **with_reference)
    features = inception_features(inception_weights, 32, torch.device("cpu"))
    sets = {
        name: Statistics.of(
            features.of([Image.open(p).convert("RGB") for p in sorted((tmp_path / where).rglob(ending))])
        )
        for name, where, ending in (
            ("real", "real", "*.jpg"),
            ("plain", "a/images/plain", "*.png"),
            ("gated", "a/images/gate-step-1", "*.png"),
        )
    }
    measures = evaluation["gate step 1"].measures
    assert measures["fid"] == pytest.approx(frechet_distance(sets["gated"], sets["real"]), rel=1e-6)
    for name, contender in (("plain", "plain"), ("gated", "gate-step-1")):
        (path,) = (tmp_path / "a" / "statistics").glob(f"{contender}.inception.*.npz")
        kept = Statistics.load(path)
        assert torch.allclose(kept.mean, sets[name].mean, atol=1e-6)
        assert torch.allclose(kept.covariance, sets[name].covariance, atol=1e-6)
    assert measures["fid_to_plain"] > 0.0
    assert evaluation["plain"].measures["fid_to_plain"] == pytest.approx(0.0, abs=1e-6)
    about = evaluation.protocol["fid_reference"]
    assert (about["count"], about["images"], about["folder"]) == (3, 3, str(tmp_path / "real"))
    assert evaluation.protocol["fid_features"]["size"] == 32
    assert "2 images" in evaluation.remarks[0]

    # The statistics are kept, but only used for the same images.
    (reference,) = (tmp_path / "a" / "statistics").glob("reference.*.npz")
    before = reference.stat().st_mtime_ns
    blind = Features("inception", lambda pixels: pytest.fail("not again"), features.prepare, features.about)
    reference_statistics(tmp_path / "real", blind, tmp_path / "a" / "statistics")
    assert reference.stat().st_mtime_ns == before
    (real / "2.jpg").unlink()
    with pytest.raises(pytest.fail.Exception):
        reference_statistics(tmp_path / "real", blind, tmp_path / "a" / "statistics")

    assert reference_statistics(reference, blind, tmp_path / "a" / "statistics").count == 3
    alone = evaluate(pipe, [3], PROMPTS, tmp_path / "a", **{**arguments, "fid_size": 16})
    assert "fid" not in alone["plain"].measures
    assert "fid_reference" in alone.not_measured["fid"]


def test_lpips_is_the_lpips_packages() -> None:
    made = torch.Generator().manual_seed(0)
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    weights = {}
    for index, (wider, wide, size) in shapes.items():
        scale = (2 / (wide * size * size)) ** 0.5
        weights[f"features.{index}.weight"] = scale * torch.randn(wider, wide, size, size, generator=made)
        weights[f"features.{index}.bias"] = 0.1 * torch.randn(wider, generator=made)
    network = Lpips(weights)
    a, b = torch.rand(2, 1, 3, 64, 64, generator=made)
    with torch.no_grad():
        assert network(a, a).item() == 0.0
        assert network(a, b).item() == network(b, a).item() == pytest.approx(LPIPS, rel=1e-4)


def test_lpips_and_clip_over_a_folder(tmp_path: Path) -> None:
    import transformers

    made = torch.Generator().manual_seed(0)
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    weights = {
        f"features.{i}.weight": 0.05 * torch.randn(o, n, k, k, generator=made) for i, (o, n, k) in shapes.items()
    }
    weights |= {f"features.{i}.bias": torch.zeros(o) for i, (o, _, _) in shapes.items()}
    torch.save({**weights, "classifier.1.weight": torch.zeros(1)}, tmp_path / "alexnet.pth")
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    text = tiny_pipelines._text_config(16).to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8, "projection_dim": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = tiny_pipelines.seeded(lambda: transformers.CLIPModel(config))
    size = {"crop_size": {"height": 16, "width": 16}, "size": {"shortest_edge": 16}}
    processor = transformers.CLIPImageProcessorPil(**size)
    for part in (model, pipe.tokenizer, processor):
        part.save_pretrained(tmp_path / "clip")
    call = {**GUIDANCE, "height": 64, "width": 64}
    evaluation = evaluate(
        pipe, [Schedule(1)], PROMPTS, tmp_path / "a", num_inference_steps=2, call=call,
        lpips_weights=tmp_path / "alexnet.pth", clip=tmp_path / "clip",
    )  # fmt: skip
    images = [Image.open(tmp_path / "a" / "images" / "gate-step-1" / f"0000{i}-0.png") for i in (0, 1)]
    expected = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        inputs = pipe.tokenizer(prompt, return_tensors="pt")
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            found = model(**inputs, pixel_values=pixels)
        expected.append(max(100 * torch.cosine_similarity(found.image_embeds, found.text_embeds).item(), 0.0))
    measures = evaluation["gate step 1"].measures
    assert measures["clip_score"] == pytest.approx(sum(expected) / 2, rel=1e-3)
    assert measures["lpips"] > evaluation["plain"].measures["lpips"] == 0.0  # type: ignore[operator]
    assert not {"lpips", "clip_score"} & set(evaluation.not_measured)


def test_the_embedded_pipeline_is_read(tmp_path: Path) -> None:
    prompts = ["a large red circle on a blue background", "a small white star on a green background"]
    evaluation = evaluate(
        load_demo_pipeline(), {"early": Schedule(1)}, prompts, tmp_path, num_inference_steps=6, call=GUIDANCE
    )
    reader = AttributeReader.load()
    for row in evaluation.rows:
        images = [Image.open(tmp_path / "images" / row.label / f"0000{i}-0.png") for i in (0, 1)]
        pixels = pixels_of(images)
        assert row.measures["accuracy"] == right(reader, pixels, prompts).mean().item()
        own, drawn = (Statistics.of(reader.features(x)) for x in (pixels, drawings(prompts, 8, seed=0).float() / 255))
        assert row.measures["frechet_to_drawings"] == pytest.approx(frechet_distance(own, drawn), rel=1e-4)
    assert evaluation["plain"].measures["accuracy"] == 1.0
    assert evaluation["plain"].measures["lost"] == 0
    assert evaluation["early"].measures["frechet_to_plain"] > 0.0  # type: ignore[operator]
    assert evaluation["early"].measures["lost"] == 2 * (1.0 - evaluation["early"].measures["accuracy"])  # type: ignore[operator]


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({"schedules": []}, "schedules must"),
        ({"schedules": {}}, "schedules must"),
        ({"schedules": ["gate step 3"]}, "schedules must"),
        ({"schedules": [0]}, "schedules must"),
        ({"schedules": {"Early!": Schedule(2), "early": Schedule(3)}}, "too similar"),
        ({"schedules": {"plain": Schedule(2)}}, "too similar"),
        ({"prompts": None}, "prompts must"),
        ({"prompts": []}, "prompts must"),
        ({"seeds": ()}, "seeds"),
        ({"batch_size": 0}, "batch_size"),
        ({"call": {"output_type": "np"}}, r"evaluate\(\) sets output_type"),
        ({"call": {"guidance": 5.0}}, 'has no option "guidance".'),
        ({"fid_weights": "none.pth"}, "fid_weights: the file none.pth does not exist"),
        ({"lpips_weights": "none.pth"}, "lpips_weights: the file none.pth does not exist"),
        ({"fid_reference": "none"}, "fid_reference: none does not exist"),
        ({"fid_size": 1}, "fid_size"),
        ({"clip": "none"}, "clip: none is not a folder"),
        ({"attributes": True}, "not captions"),
        ({"backend": "tensorrt-"}, "tensorrt-"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(
    arguments: dict[str, Any], shown: str, tmp_path: Path
) -> None:
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    pipe.unet.forward = None
    given = {"schedules": [Schedule(2)], "prompts": PROMPTS, "folder": tmp_path / "a", **arguments}
    with pytest.raises(ConfigurationError, match=shown):
        evaluate(pipe, **given)
    assert not (tmp_path / "a").exists()


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_text("no weights")
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    for option in ("fid_weights", "lpips_weights"):
        for name in ("a.pth", "b.pth"):
            with pytest.raises(ConfigurationError, match=rf"{option}: .*{name} does not contain weights"):
                evaluate(pipe, [3], PROMPTS, tmp_path / "e", num_inference_steps=2, **{option: tmp_path / name})  # type: ignore[arg-type]


def test_pipelines_without_images_and_optimized_ones_are_refused(tmp_path: Path) -> None:
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    optimize(pipe, 2, backend="eager")
    with pytest.raises(ConfigurationError, match="already optimized"):
        evaluate(pipe, [Schedule(2)], PROMPTS, tmp_path)
    case = CASES["AnimateDiffPipeline"]
    call = {name: value for name, value in case.call(1).items() if name in ("num_frames", "height", "width")}
    with pytest.raises(UnsupportedModelError, match="Evaluations need images"):
        evaluate(case.build(), [3], PROMPTS, tmp_path / "video", num_inference_steps=2, call=call)


def test_contenders_have_labels() -> None:
    plain, gated, fewer = contenders_of([Schedule(10, sp_interval=5), 15], 25)
    assert (plain.label, gated.label, fewer.label) == ("plain", "gate step 10, sp interval 5", "15 steps")
    assert (gated.file_name, gated.steps, fewer.steps) == ("gate-step-10-sp-interval-5", 25, 15)


# Killed processes, and several processes at once.

_PROGRAM = """
import os
import signal
import sys
import torch
from tests import tiny_pipelines
from tgate_compile import Schedule, evaluate

def progress(done, total, what):
    if len(sys.argv) > 2 and done == 6:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
prompts = ["red cat", "blue dog", "old tree", "new car"]
pipe = tiny_pipelines.stable_diffusion(layout="small")
done = evaluate(
    pipe, {"early": Schedule(2)}, prompts, sys.argv[1], num_inference_steps=4, call={"guidance_scale": 5.0},
    progress=progress,
)
with open(f"{sys.argv[1]}-{os.environ.get('RANK', '0')}", "w") as file:
    file.write(repr(done["early"].measures["psnr"]))
"""


def _run(*program: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = {**clean, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.heavy
def test_killed_in_the_middle_it_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    killed = _run("-c", _PROGRAM, str(folder), "kill")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = files_of(folder)
    assert len(before) == 6
    assert not (folder / "results.json").exists()
    # A process killed while it writes leaves such a file.
    part = folder / "images" / "early" / "00002-0.png.1.part"
    part.write_bytes(b"cut off")
    pipe = tiny_pipelines.stable_diffusion(layout="small")
    prompts = ["red cat", "blue dog", "old tree", "new car"]
    request: dict[str, Any] = {"num_inference_steps": 4, "call": GUIDANCE}
    finished = evaluate(pipe, {"early": Schedule(2)}, prompts, folder, **request)
    after = files_of(folder)
    assert len(after) == 8
    assert {name: after[name] for name in before} == before
    assert not part.exists()

    whole = tmp_path / "whole"
    expected = evaluate(pipe, {"early": Schedule(2)}, prompts, whole, **request)
    assert finished["early"].measures["psnr"] == expected["early"].measures["psnr"]
    for name in after:
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.heavy
def test_two_processes_share_the_images(tmp_path: Path) -> None:
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        number = str(port.getsockname()[1])
    (tmp_path / "program.py").write_text(_PROGRAM)
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", number)
    finished = _run(*launcher, str(tmp_path / "program.py"), str(tmp_path / "folder"))
    assert finished.returncode == 0, finished.stderr
    assert len(files_of(tmp_path / "folder")) == 8
    scores = [(tmp_path / f"folder-{rank}").read_text() for rank in (0, 1)]
    assert scores[0] == scores[1]  # both use the first one's measurements
    data = json.loads((tmp_path / "folder" / "results.json").read_text())
    assert data["rows"][1]["images"] == 4


def test_shares_are_all_of_it() -> None:
    items = list(range(10))
    shares = [Share.from_environment({"RANK": str(rank), "WORLD_SIZE": "3"}).of(items) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == items
    assert Share.from_environment({}) == Share(0, 1)
    for rank, world in (("3", "3"), ("-1", "2"), ("a", "2"), ("0", "0")):
        with pytest.raises(ConfigurationError, match="RANK"):
            Share.from_environment({"RANK": rank, "WORLD_SIZE": world})
