/** Choose the noise scheduler of the manifest. Like `runtime/_schedulers.py`. */

import { Ddim } from "./ddim.js";
import { DpmPlusPlus } from "./dpm_plus_plus.js";
import { BundleError } from "./errors.js";
import { Euler, FlowMatchEuler } from "./euler.js";

const CLASSES = {
  DDIMScheduler: Ddim,
  EulerDiscreteScheduler: Euler,
  DPMSolverMultistepScheduler: DpmPlusPlus,
  FlowMatchEulerDiscreteScheduler: FlowMatchEuler,
};

/**
 * Return the manifest's scheduler for `steps` steps. It has `timesteps`, `initialSigma`, `modelInput` and `step`, which is
 * called for each step in order. Throws BundleError if the scheduler is not supported.
 */
export function makeScheduler(spec, steps) {
  if (!Object.hasOwn(CLASSES, spec.class_name)) {
    throw new BundleError(
      `The bundle's scheduler is a ${spec.class_name}, which this page does not support. Export the bundle from a pipeline ` +
        `with one of these: ${Object.keys(CLASSES).join(", ")}.`,
    );
  }
  const most = spec.config.num_train_timesteps ?? 1000;
  if (!Number.isInteger(steps) || steps < 1 || steps > most) {
    throw new BundleError(`The number of steps must be an integer from 1 to ${most}, but got ${steps}.`);
  }
  return new CLASSES[spec.class_name](spec.config, steps);
}
