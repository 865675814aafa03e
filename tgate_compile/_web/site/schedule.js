/** Read what each step does from the plans in the manifest. Like `bundle/plan_rows.py`. */

import { BundleError } from "./errors.js";

/** The digits of a row, each the position of a phase. */
const DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";

/** Return the largest number of steps that a manifest has plans for. */
export function mostSteps({ plans }) {
  return plans.guided.length;
}

/** Return whether the gate of a bundle's schedule can be moved. */
export function hasMovableGate({ plans }) {
  return plans.gated_guided !== null;
}

/** Return the first step after the gate, or `steps` if there is no gate. */
export function gateOf({ plans }, steps) {
  return plans.gates[checkedSteps(plans, steps) - 1] ?? steps;
}

/**
 * Return what each of `steps` steps does: `{letter, graph, phase, weights}`, where `weights` has the weights of the last
 * values, newest first, of each kind of value that is forecast. `guided` is whether guidance is on at first, and
 * `gateStep`, unless it is undefined, moves the gate. Throws BundleError if the manifest has no such plan.
 */
export function planOf({ plans }, steps, guided, gateStep) {
  checkedSteps(plans, steps);
  if (gateStep === undefined) return phasesOf(plans, (guided ? plans.guided : plans.unguided)[steps - 1]);
  const rows = guided ? plans.gated_guided : plans.gated_unguided;
  if (rows === null) throw new BundleError("The gate of the bundle's schedule cannot be moved.");
  if (!(Number.isInteger(gateStep) && gateStep >= 1)) throw new BundleError(`gateStep must be a positive integer, but got ${gateStep}.`);
  return phasesOf(plans, rows[Math.min(gateStep, rows.length) - 1].slice(0, steps * (plans.width ?? 1)));
}

/** Return the plan of the plain pipeline, which computes everything in every step. */
export function plainPlan({ plans }, steps, guided) {
  const full = plans.phases[guided ? plans.full_guided : plans.full_unguided];
  return Array.from({ length: checkedSteps(plans, steps) }, () => full);
}

/** Return the strip of a plan: one letter per step, a capital one with guidance. */
export function stripOf(plan) {
  return plan.map(({ letter }) => letter).join("");
}

function phasesOf(plans, row) {
  const width = plans.width ?? 1, digits = Array.from({ length: row.length / width }, (_, i) => [...row.slice(i * width, (i + 1) * width)]);
  return digits.map((of) => plans.phases[of.reduce((place, digit) => place * DIGITS.length + DIGITS.indexOf(digit), 0)]);
}

function checkedSteps(plans, steps) {
  if (steps > plans.guided.length) throw new BundleError(`This bundle has plans for up to ${plans.guided.length} steps, but the call asks for ${steps}.`);
  return steps;
}
