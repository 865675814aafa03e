"""Make an image from text with T-GATE: load a pipeline, optimize it, and call it as usual.

This runs offline with the pipeline embedded in the package:

    python examples/text_to_image.py

For a real checkpoint, replace `load_demo_pipeline()` with, for example,
`StableDiffusionXLPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0").to("cuda")`.
"""

import argparse

import torch

import tgate_compile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a large yellow star on a green background")
    parser.add_argument("--out", default="star.png")
    arguments = parser.parse_args()

    pipe = tgate_compile.load_demo_pipeline()

    # Ten full steps, then the pruned graph without cross-attention and with half the batch. "eager" starts immediately;
    # the default backend compiles the graphs during the first call, which pays off for larger models or many images.
    tgate_compile.optimize(pipe, gate_step=10, backend="eager")

    image = pipe(
        arguments.prompt,
        num_inference_steps=25,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    image.save(arguments.out)

    print(tgate_compile.describe(pipe))
    print(f"written: {arguments.out}")

    tgate_compile.restore(pipe)  # the plain pipeline again


if __name__ == "__main__":
    main()
