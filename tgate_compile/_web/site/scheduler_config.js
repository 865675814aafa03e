/** What a scheduler's configuration says, checked against what is written here. As `runtime/_scheduler_config.py`. */

import { BundleError } from "./errors.js";

/** All of these schedulers have them. The values are diffusers' defaults, for keys that a configuration leaves out. */
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
 * All of `defaults`' keys, with the values that `given` has for them.
 * Throws BundleError where a value is none of `choices`.
 */
export function checkedConfig(scheduler, given, defaults, choices) {
  const config = Object.fromEntries(Object.entries(defaults).map(([key, value]) => [key, key in given ? given[key] : value]));
  for (const [key, known] of Object.entries(choices)) {
    if (!known.includes(config[key])) {
      const there = known.map((one) => JSON.stringify(one)).join(" and ");
      throw new BundleError(
        `${scheduler} with ${key}=${JSON.stringify(config[key])} is not on this page, which has ${there} there. ` +
          "Export the bundle from a pipeline with a scheduler of that kind.",
      );
    }
  }
  return config;
}
