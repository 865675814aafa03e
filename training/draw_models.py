"""Draw a picture with images of all embedded models, with a row per caption and a column per model."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tgate_compile._demo import DEMO_VARIANTS
from tgate_compile._demo.captions import held_out_captions
from tgate_compile._demo.pipeline import load_demo_pipeline
from training.evaluate import Sampler, generate

CAPTION_SEED = 2026
_SCALE, _GAP, _TEXT_WIDTH, _HEAD = 2, 8, 440, 30
_SIDE = 64 * _SCALE


def draw_models(out: Path, *, seed: int) -> None:
    """Write a picture of five held-out captions with one object and three with two, unselected, from one seed."""
    captions = held_out_captions(5, CAPTION_SEED) + held_out_captions(3, CAPTION_SEED, 2)
    size = (_TEXT_WIDTH + len(DEMO_VARIANTS) * (_SIDE + _GAP), _HEAD + len(captions) * (_SIDE + _GAP))
    picture = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    for row, caption in enumerate(captions):
        draw.text((_GAP, _HEAD + row * (_SIDE + _GAP) + _SIDE // 2 - 8), caption, fill="black", font=font)
    for column, (name, variant) in enumerate(DEMO_VARIANTS.items()):
        x = _TEXT_WIDTH + column * (_SIDE + _GAP)
        draw.text((x, 6), f"{name}, {variant.steps} steps", fill="black", font=font)
        pipeline = load_demo_pipeline(name)
        pipeline.set_progress_bar_config(disable=True)
        sampler = Sampler(pipeline, variant.steps, variant.call)
        for row, image in enumerate(generate(sampler, captions, guidance=variant.guidance, seed=seed)):
            picture.paste(image.resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (x, _HEAD + row * (_SIDE + _GAP)))
    picture.save(out, optimize=True)
