"""T-GATE in your own denoising loop: `tgate_compile.generation` marks where it begins and ends.

python examples/own_loop.py
"""

import argparse

import torch

import tgate_compile

PROMPT = "a large red circle on a blue background"
STEPS, SCALE = 25, 5.0


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="circle.png")
    arguments = parser.parse_args()

    pipe = tgate_compile.load_demo_pipeline()
    tgate_compile.optimize(pipe, gate_step=10, backend="eager")

    cond, uncond = pipe.encode_prompt(PROMPT, "cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    text = torch.cat([uncond, cond])  # [2, tokens, dim]
    size = pipe.unet.config.sample_size
    latents = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(0))

    pipe.scheduler.set_timesteps(STEPS)  # before the first denoiser call: steps are counted by it
    latents = latents * pipe.scheduler.init_noise_sigma
    with tgate_compile.generation(pipe, guidance=True):
        for timestep in pipe.scheduler.timesteps:
            both = pipe.scheduler.scale_model_input(torch.cat([latents] * 2), timestep)  # [2, 4, size, size]
            # Always pass both halves. After the gate one is computed, and its prediction is returned for both.
            predicted = pipe.unet(both, timestep, encoder_hidden_states=text).sample
            noise_uncond, noise_cond = predicted.chunk(2)
            noise = noise_uncond + SCALE * (noise_cond - noise_uncond)
            latents = pipe.scheduler.step(noise, timestep, latents).prev_sample

    pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    pipe.image_processor.postprocess(pixels)[0].save(arguments.out)
    print("steps:", tgate_compile.describe(pipe).strip)
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
