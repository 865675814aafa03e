"""Measure whether a denoiser uses the caption, by the increase of its loss when one word of the caption is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from tgate_compile._demo.captions import COLOURS, POSITIONS, SHAPES, SIZES, Scene, caption_of, random_scene
from training.data import images_of
from training.denoisers import FAMILIES
from training.objectives import GUIDANCE_FROM, noise_schedule


@torch.no_grad()
def probe(parts: Path, embedded: Path, checkpoint: Path, *, n: int, seed: int) -> dict[str, float]:
    """Return the relative increase of the loss by attribute; 0 means that the word makes no difference."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    name = state["config"]["family"]
    family, shared = FAMILIES[name], parts if name == "sd" else embedded
    model = family.build().eval()
    model.load_state_dict(state["average"])
    vae = AutoencoderKL.from_pretrained(shared / "vae").float().eval()
    encode = family.encoder(parts / name if family.own_text else shared, "cpu")
    guidance = torch.full((n,), GUIDANCE_FROM)  # for models that take it as an input
    alphas = noise_schedule().alphas_cumprod
    rises: dict[str, float] = {"samples": float(state["samples"])}
    for objects, attributes in ((1, _SINGLE), (2, _PAIR)):
        rng = np.random.default_rng(seed)
        scenes = [random_scene(rng, objects) for _ in range(n)]
        if objects == 1:
            scenes = [_sized_and_placed(scene, rng) for scene in scenes]
        clean = torch.cat([vae.encode(part).latent_dist.mode() for part in images_of(scenes, rng).split(64)])
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(clean.shape, generator=generator)
        # The middle of the noise levels, where the caption matters most.
        timesteps = torch.randint(400, 900, (n,), generator=generator)
        signal, spread = (x.view(-1, 1, 1, 1) for x in (alphas[timesteps].sqrt(), (1 - alphas[timesteps]).sqrt()))

        def loss(captions: list[str]) -> float:
            noisy = signal * clean + spread * noise  # noqa: B023
            prediction = family.predict(model, noisy, timesteps, encode(captions), guidance)  # noqa: B023
            return float((prediction - (signal * noise - spread * clean)).square().mean())  # noqa: B023

        right = loss([caption_of(scene) for scene in scenes])
        rises[f"loss of {objects}"] = right
        for name, change in attributes.items():
            rises[name] = loss([caption_of(change(scene, rng)) for scene in scenes]) / right - 1
    return rises


def _sized_and_placed(scene: Scene, rng: np.random.Generator) -> Scene:
    item = dataclasses.replace(scene.objects[0], size=SIZES[rng.integers(2)])
    return dataclasses.replace(scene, objects=(item,), position=POSITIONS[rng.integers(4)])


def _other(options: tuple[str, ...], *taken: str | None, rng: np.random.Generator) -> str:
    left = [option for option in options if option not in taken]
    return left[rng.integers(len(left))]


def _with_first(scene: Scene, **changes: str) -> Scene:
    first = dataclasses.replace(scene.objects[0], **changes)  # type: ignore[arg-type]
    return dataclasses.replace(scene, objects=(first, *scene.objects[1:]))


def _wrong_shape(scene: Scene, rng: np.random.Generator) -> Scene:
    return _with_first(scene, shape=_other(SHAPES, scene.objects[0].shape, rng=rng))


def _wrong_colour(scene: Scene, rng: np.random.Generator) -> Scene:
    return _with_first(scene, colour=_other(COLOURS, scene.objects[0].colour, scene.background, rng=rng))


def _wrong_size(scene: Scene, rng: np.random.Generator) -> Scene:
    return _with_first(scene, size=_other(SIZES, scene.objects[0].size, rng=rng))


def _wrong_background(scene: Scene, rng: np.random.Generator) -> Scene:
    taken = [item.colour for item in scene.objects]
    background = _other(COLOURS, scene.background, *taken, rng=rng)
    return dataclasses.replace(scene, background=background)  # type: ignore[arg-type]


def _wrong_position(scene: Scene, rng: np.random.Generator) -> Scene:
    position = _other(POSITIONS, scene.position, rng=rng)
    return dataclasses.replace(scene, position=position)  # type: ignore[arg-type]


def _exchanged(scene: Scene, rng: np.random.Generator) -> Scene:
    return dataclasses.replace(scene, objects=scene.objects[::-1])


def _exchanged_shapes(scene: Scene, rng: np.random.Generator) -> Scene:
    first, second = scene.objects
    if first.colour == second.colour:
        return _exchanged(scene, rng)
    pair = dataclasses.replace(first, shape=second.shape), dataclasses.replace(second, shape=first.shape)
    return dataclasses.replace(scene, objects=pair)


_SINGLE = {
    "shape": _wrong_shape,
    "colour": _wrong_colour,
    "size": _wrong_size,
    "background": _wrong_background,
    "position": _wrong_position,
}
_PAIR = {
    "pair: first shape": _wrong_shape,
    "pair: first colour": _wrong_colour,
    "pair: objects exchanged": _exchanged,
    "pair: shapes exchanged": _exchanged_shapes,
}
