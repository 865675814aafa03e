/**
 * DPM-Solver++, second-order multistep (arXiv 2211.01095, algorithm 2).
 * Like `runtime/_dpm_plus_plus.py`.
 */

import { alphasAboveZero, countdown, interpolated, karrasSigmas, linspace, roundToEven, sigmasOf, timestepsOf } from "./noise_levels.js";
import { COMMON, COMMON_CHOICES, checkedConfig } from "./scheduler_config.js";

const DEFAULTS = {
  ...COMMON,
  solver_order: 2,
  algorithm_type: "dpmsolver++",
  solver_type: "midpoint",
  lower_order_final: true,
  euler_at_final: false,
  thresholding: false,
  use_karras_sigmas: false,
  use_exponential_sigmas: false,
  use_beta_sigmas: false,
  use_lu_lambdas: false,
  use_flow_sigmas: false,
  final_sigmas_type: "zero",
  lambda_min_clipped: "-inf",
  variance_type: null,
  timestep_spacing: "linspace",
};
const CHOICES = {
  ...COMMON_CHOICES,
  solver_order: [1, 2],
  algorithm_type: ["dpmsolver++"],
  solver_type: ["midpoint", "logrho", "bh1", "bh2"], // diffusers treats the others as "midpoint"
  thresholding: [false],
  use_exponential_sigmas: [false],
  use_beta_sigmas: [false],
  use_lu_lambdas: [false],
  use_flow_sigmas: [false],
  final_sigmas_type: ["zero", "sigma_min"],
  variance_type: [null],
};
/** Below this number of steps `lower_order_final` takes effect, as in diffusers. */
const FEW_STEPS = 15;

/** `DPMSolverMultistepScheduler` of diffusers, of order 1 or 2, for a generation of `steps` steps. */
export class DpmPlusPlus {
  initialSigma = 1;
  #config;
  #sigmas;
  #before = null;

  constructor(given, steps) {
    this.#config = checkedConfig("DPMSolverMultistepScheduler", given, DEFAULTS, CHOICES);
    const alphas = alphasAboveZero(this.#config), training = sigmasOf(alphas);
    let timesteps, sigmas;
    if (this.#config.use_karras_sigmas) {
      sigmas = karrasSigmas(training[training.length - 1], training[0], steps);
      timesteps = timestepsOf(sigmas, training);
      if (this.#config.beta_schedule !== "squaredcos_cap_v2") timesteps = timesteps.map(roundToEven);
    } else {
      timesteps = this.#spaced(steps, alphas);
      sigmas = interpolated(timesteps, training);
    }
    this.#sigmas = Float32Array.from([...sigmas, this.#config.final_sigmas_type === "sigma_min" ? training[0] : 0]);
    this.timesteps = timesteps.map(Math.trunc);
  }

  /** Return the denoiser's input for `latents` at `step`. */
  modelInput(latents, step) {
    return latents;
  }

  /** Return the latents after `step`, given the denoiser's `prediction`; steps must be in order. */
  step(prediction, step, latents) {
    const sigma = this.#sigmas[step], after = this.#sigmas[step + 1];
    const scale = (sigma ** 2 + 1) ** -0.5, scaleAfter = (after ** 2 + 1) ** -0.5;
    const clean = this.#clean(prediction, latents, sigma, scale);
    let towards = clean;
    if (this.#isSecondOrder(step)) {
      const ratio = Math.log(this.#sigmas[step - 1] / sigma) / Math.log(sigma / after), before = this.#before;
      towards = clean.map((value, i) => value + ((value - before[i]) * 0.5) / ratio);
    }
    this.#before = clean;
    // exp(-h), where h is the difference of the two log-SNRs, is the ratio of the sigmas.
    const kept = (after * scaleAfter) / (sigma * scale), moved = scaleAfter * (after / sigma - 1);
    return latents.map((latent, i) => kept * latent - moved * towards[i]);
  }

  #clean(prediction, latents, sigma, scale) {
    const type = this.#config.prediction_type;
    if (type === "sample") return Float32Array.from(prediction);
    return latents.map((latent, i) =>
      type === "epsilon" ? (latent - sigma * scale * prediction[i]) / scale : scale * latent - sigma * scale * prediction[i],
    );
  }

  #isSecondOrder(step) {
    const { solver_order: order, euler_at_final: euler, lower_order_final: lower, final_sigmas_type: end } = this.#config;
    if (order === 1 || step === 0) return false;
    const isLast = step === this.timesteps.length - 1, few = this.timesteps.length < FEW_STEPS;
    return !(isLast && (euler || (lower && few) || end === "zero"));
  }

  #spaced(steps, alphas) {
    const { num_train_timesteps: trained, timestep_spacing: spacing, steps_offset: offset } = this.#config;
    const limit = this.#config.lambda_min_clipped === "-inf" ? -Infinity : this.#config.lambda_min_clipped;
    const logSnrs = alphas.map((alpha) => Math.fround(Math.log(Math.sqrt(alpha))) - Math.fround(Math.log(Math.sqrt(1 - alpha))));
    const most = trained - logSnrs.filter((one) => one < limit).length;
    if (spacing === "linspace") return linspace(0, most - 1, steps + 1).map(roundToEven).reverse().slice(0, -1);
    if (spacing === "leading") {
      const stride = Math.floor(most / (steps + 1));
      return Array.from({ length: steps }, (_, i) => (steps - i) * stride + offset);
    }
    return countdown(most, trained / steps).map((timestep) => roundToEven(timestep) - 1);
  }
}
