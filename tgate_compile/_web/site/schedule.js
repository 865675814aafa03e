/** Schedules: what each step does, read from the plans in the manifest. As `bundle/plan_rows.py`. */

import { BundleError } from "./errors.js";

/** The most steps that a manifest has plans for. */
export function mostSteps({ plans }) {
  return plans.guided.length;
}

/** Whether the gate of a bundle's schedule can be moved. */
export function hasMovableGate({ plans }) {
  return plans.gated_guided !== null;
}

/** The first step after the gate; `steps` if there is none. */
export function gateOf({ plans }, steps) {
  return plans.gates[checkedSteps(plans, steps) - 1] ?? steps;
}

/**
 * What each of `steps` steps does: `{letter, graph, phase}`. `guided` says whether guidance is on to begin with, and
 * `gateStep`, unless it is undefined, moves the gate. Throws BundleError where the manifest has no plan for that.
 */
export function planOf({ plans }, steps, guided, gateStep) {
  checkedSteps(plans, steps);
  if (gateStep === undefined) return phasesOf(plans, (guided ? plans.guided : plans.unguided)[steps - 1]);
  const rows = guided ? plans.gated_guided : plans.gated_unguided;
  if (rows === null) throw new BundleError("The bundle's schedule has no gate that could be moved.");
  if (!(Number.isInteger(gateStep) && gateStep >= 1)) throw new BundleError(`gateStep must be a whole number, at least 1, but got ${gateStep}.`);
  return phasesOf(plans, rows[Math.min(gateStep, rows.length) - 1].slice(0, steps));
}

/** The same for the plain pipeline: everything is computed, in every step. */
export function plainPlan({ plans }, steps, guided) {
  const full = plans.phases[guided ? plans.full_guided : plans.full_unguided];
  return Array.from({ length: checkedSteps(plans, steps) }, () => full);
}

/** A plan as a strip: one letter a step, a capital one with guidance. */
export function stripOf(plan) {
  return plan.map(({ letter }) => letter).join("");
}

function phasesOf(plans, row) {
  return [...row].map((digit) => plans.phases[Number.parseInt(digit, 36)]);
}

function checkedSteps(plans, steps) {
  if (steps > plans.guided.length) throw new BundleError(`This bundle has plans for up to ${plans.guided.length} steps, but the call asks for ${steps}.`);
  return steps;
}
