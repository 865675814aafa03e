/** Check the configuration of a scheduler. Like `runtime/_noise.py`. */

import { BundleError } from "./errors.js";

/** The settings that all schedulers have, with diffusers' defaults for keys that a configuration omits. */
export const COMMON = {
  num_train_timesteps: 1000,
  beta_start: 0.0001,
  beta_end: 0.02,
  beta_schedule: "linear",
  trained_betas: null,
  rescale_betas_zero_snr: false,
  prediction_type: "epsilon",
  steps_offset: 0,
};
export const COMMON_CHOICES = {
  beta_schedule: ["linear", "scaled_linear", "squaredcos_cap_v2"],
  prediction_type: ["epsilon", "sample", "v_prediction"],
  timestep_spacing: ["leading", "trailing", "linspace"],
};

/**
 * Return `defaults`, updated by the values of the same keys in `given`.
 * Throws BundleError if a value is not among `choices`.
 */
export function checkedConfig(scheduler, given, defaults, choices) {
  const config = Object.fromEntries(Object.entries(defaults).map(([key, value]) => [key, key in given ? given[key] : value]));
  for (const [key, known] of Object.entries(choices)) {
    if (!known.includes(config[key])) {
      const supported = known.map((one) => JSON.stringify(one)).join(" and ");
      throw new BundleError(
        `This page does not support ${scheduler} with ${key}=${JSON.stringify(config[key])}, only with ${supported}. ` +
          "Export the bundle from a pipeline with such a scheduler.",
      );
    }
  }
  return config;
}
