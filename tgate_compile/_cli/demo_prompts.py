"""The demo's prompts: combinations that the embedded model was never trained on."""

from __future__ import annotations

import numpy as np

from tgate_compile._demo.captions import caption_of, random_scene

#: Shown first, in this order. Six single objects, two pairs; every combination is held out (a test checks that).
CHOSEN = (
    "a large red circle on a blue background",
    "a large yellow star on a green background",
    "a red square left of a yellow star on a white background",
    "a large purple triangle at the top of a white background",
    "a small orange square on a white background",
    "a large black square on an orange background",
    "a yellow circle above a green triangle on a blue background",
    "a small green star at the right of a blue background",
)

_SEED = 0
_SHARE_OF_PAIRS = 4  # one of so many


def demo_prompts(count: int) -> list[str]:
    """The first `count` prompts; those beyond the chosen ones are drawn from the held-out captions, always the same."""
    rng = np.random.default_rng(_SEED)
    prompts = list(CHOSEN[:count])
    while len(prompts) < count:
        objects = 2 if len(prompts) % _SHARE_OF_PAIRS == 0 else 1
        prompt = caption_of(random_scene(rng, objects, held_out=True))
        if prompt not in prompts:
            prompts.append(prompt)
    return prompts
