/** DDIM (arXiv 2010.02502), deterministic. Like `runtime/_ddim.py`. */

import { BundleError } from "./errors.js";
import { countdown, cumulativeAlphas, linspace, roundToEven } from "./noise_levels.js";
import { COMMON, COMMON_CHOICES, checkedConfig } from "./scheduler_config.js";

const DEFAULTS = {
  ...COMMON,
  clip_sample: true,
  clip_sample_range: 1.0,
  set_alpha_to_one: true,
  thresholding: false,
  timestep_spacing: "leading",
};

/** `DDIMScheduler` of diffusers with `eta=0`, for a generation of `steps` steps. */
export class Ddim {
  initialSigma = 1;
  #config;
  #alphas;
  #stride;

  constructor(given, steps) {
    this.#config = checkedConfig("DDIMScheduler", given, DEFAULTS, { ...COMMON_CHOICES, thresholding: [false] });
    this.#alphas = cumulativeAlphas(this.#config);
    this.#stride = Math.floor(this.#config.num_train_timesteps / steps);
    this.timesteps = this.#spaced(steps);
    if (this.timesteps[0] >= this.#alphas.length) {
      throw new BundleError(
        `With ${steps} steps and its steps_offset, DDIM starts at timestep ${this.timesteps[0]}, but the model was ` +
          `trained up to ${this.#alphas.length - 1}. Use fewer steps.`,
      );
    }
  }

  /** Return the denoiser's input for `latents` at `step`. */
  modelInput(latents, step) {
    return latents;
  }

  /** Return the latents after `step`, given the denoiser's `prediction` for those before it. */
  step(prediction, step, latents) {
    const { prediction_type: type, clip_sample: clips, clip_sample_range: range } = this.#config;
    const alpha = this.#alpha(this.timesteps[step]), next = this.#alpha(this.timesteps[step] - this.#stride);
    const signal = Math.sqrt(alpha), noise = Math.sqrt(1 - alpha);
    return latents.map((latent, i) => {
      const given = prediction[i];
      let clean = signal * latent - noise * given, epsilon = signal * given + noise * latent;
      if (type === "epsilon") [clean, epsilon] = [(latent - noise * given) / signal, given];
      else if (type === "sample") [clean, epsilon] = [given, (latent - signal * given) / noise];
      if (clips) clean = Math.min(Math.max(clean, -range), range);
      return Math.sqrt(next) * clean + Math.sqrt(1 - next) * epsilon;
    });
  }

  #alpha(timestep) {
    return timestep < 0 && this.#config.set_alpha_to_one ? 1 : this.#alphas[Math.max(timestep, 0)];
  }

  #spaced(steps) {
    const { num_train_timesteps: trained, timestep_spacing: spacing, steps_offset: offset } = this.#config;
    if (spacing === "linspace") return linspace(0, trained - 1, steps).map(roundToEven).reverse();
    if (spacing === "leading") {
      return Array.from({ length: steps }, (_, i) => i * Math.floor(trained / steps) + offset).reverse();
    }
    return countdown(trained, trained / steps).map((timestep) => roundToEven(timestep) - 1);
  }
}
