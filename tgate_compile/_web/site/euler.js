/** Euler's method for the probability flow ODE (arXiv 2206.00364, algorithm 1 without churn). Like `runtime/_euler.py`. */

import { alphasAboveZero, countdown, interpolated, karrasSigmas, linspace, roundToEven, sigmasOf, timestepsOf } from "./noise_levels.js";
import { COMMON, COMMON_CHOICES, checkedConfig } from "./scheduler_config.js";

const DEFAULTS = {
  ...COMMON,
  interpolation_type: "linear",
  use_karras_sigmas: false,
  use_exponential_sigmas: false,
  use_beta_sigmas: false,
  sigma_min: null,
  sigma_max: null,
  timestep_spacing: "linspace",
  timestep_type: "discrete",
  final_sigmas_type: "zero",
};
const CHOICES = {
  ...COMMON_CHOICES,
  interpolation_type: ["linear"],
  use_exponential_sigmas: [false],
  use_beta_sigmas: [false],
  timestep_type: ["discrete"],
  final_sigmas_type: ["zero", "sigma_min"],
};

/** `EulerDiscreteScheduler` of diffusers without churn, for a generation of `steps` steps. */
export class Euler {
  #config;
  #sigmas;

  constructor(given, steps) {
    this.#config = checkedConfig("EulerDiscreteScheduler", given, DEFAULTS, CHOICES);
    const training = sigmasOf(alphasAboveZero(this.#config));
    let timesteps = this.#spaced(steps);
    let sigmas = interpolated(timesteps, training);
    if (this.#config.use_karras_sigmas) {
      sigmas = karrasSigmas(this.#config.sigma_max || sigmas[0], this.#config.sigma_min || sigmas[steps - 1], steps);
      timesteps = timestepsOf(sigmas, training);
    }
    this.#sigmas = Float32Array.from([...sigmas, this.#config.final_sigmas_type === "sigma_min" ? training[0] : 0]);
    this.timesteps = [...Float32Array.from(timesteps)];
    const largest = Math.max(...this.#sigmas);
    this.initialSigma = this.#config.timestep_spacing === "leading" ? Math.sqrt(largest ** 2 + 1) : largest;
  }

  /** Return the denoiser's input for `latents` at `step`. */
  modelInput(latents, step) {
    const scale = Math.sqrt(this.#sigmas[step] ** 2 + 1);
    return latents.map((latent) => latent / scale);
  }

  /** Return the latents after `step`, given the denoiser's `prediction` for those before it. */
  step(prediction, step, latents) {
    const sigma = this.#sigmas[step], after = this.#sigmas[step + 1], type = this.#config.prediction_type;
    return latents.map((latent, i) => {
      let clean = prediction[i] * (-sigma / Math.sqrt(sigma ** 2 + 1)) + latent / (sigma ** 2 + 1);
      if (type === "epsilon") clean = latent - sigma * prediction[i];
      else if (type === "sample") clean = prediction[i];
      return latent + ((latent - clean) / sigma) * (after - sigma);
    });
  }

  #spaced(steps) {
    const { num_train_timesteps: trained, timestep_spacing: spacing, steps_offset: offset } = this.#config;
    if (spacing === "linspace") return [...Float32Array.from(linspace(0, trained - 1, steps))].reverse();
    if (spacing === "leading") {
      return Array.from({ length: steps }, (_, i) => i * Math.floor(trained / steps) + offset).reverse();
    }
    return countdown(trained, trained / steps).map((timestep) => roundToEven(timestep) - 1);
  }
}

const FLOW_DEFAULTS = {
  num_train_timesteps: 1000,
  shift: 1,
  use_dynamic_shifting: false,
  shift_terminal: null,
  invert_sigmas: false,
  use_karras_sigmas: false,
  use_exponential_sigmas: false,
  use_beta_sigmas: false,
  stochastic_sampling: false,
};
const FLOW_CHOICES = {
  use_dynamic_shifting: [false],
  shift_terminal: [null],
  invert_sigmas: [false],
  use_karras_sigmas: [false],
  use_exponential_sigmas: [false],
  use_beta_sigmas: [false],
  stochastic_sampling: [false],
};

/** `FlowMatchEulerDiscreteScheduler` of diffusers, for a generation of `steps` steps. */
export class FlowMatchEuler {
  #sigmas;
  initialSigma = 1;

  constructor(given, steps) {
    const config = checkedConfig("FlowMatchEulerDiscreteScheduler", given, FLOW_DEFAULTS, FLOW_CHOICES);
    const { num_train_timesteps: trained, shift } = config;
    const shifted = (sigma) => (shift * sigma) / (1 + (shift - 1) * sigma);
    // diffusers shifts twice: the range, and what is spaced in it.
    const sigmas = Float32Array.from(linspace(shifted(1), shifted(1 / trained), steps).map(shifted));
    this.timesteps = [...sigmas.map((sigma) => sigma * trained)];
    this.#sigmas = [...sigmas, 0];
  }

  /** Return the denoiser's input for `latents` at `step`. */
  modelInput(latents) {
    return latents;
  }

  /** Return the latents after `step`, given the denoiser's `prediction` for those before it. */
  step(prediction, step, latents) {
    const length = this.#sigmas[step + 1] - this.#sigmas[step];
    return latents.map((latent, i) => latent + length * prediction[i]);
  }
}
