/** Schedules: from step to phase. As `_schedule.py`, whose rules `docs/schedules.md` tells. */

import { roundToEven } from "./noise_levels.js";

const LETTERS = { "": "F", self: "S", deep: "D", cross: "P", "cross,self": "Q", "cross,deep": "R" };

/** What a step does: whether both guidance halves run, and the kinds of site that it emits, merges and reuses. */
function phase(guided, { emit = [], merge = [], reuse = [] } = {}) {
  return { guided, emit: [...emit].sort(), merge: [...merge].sort(), reuse: [...reuse].sort() };
}

/** One phase's name among others: phases with equal keys are the same. */
export function keyOf({ guided, emit, merge, reuse }) {
  return [guided, ...[emit, merge, reuse].map((kinds) => [...kinds].sort().join(","))].join(";");
}

/** The phase in a strip: a capital letter with guidance. */
export function letterOf({ guided, reuse }) {
  const letter = LETTERS[[...reuse].sort().join(",")];
  return guided ? letter : letter.toLowerCase();
}

/** The first step after the gate; `steps` if there is none. A fraction is a part of the steps. */
export function gateOf(schedule, steps) {
  return stepOf(schedule.gate_step, steps);
}

/** What each of `steps` steps does; `guided` says whether guidance is on to begin with. */
export function planOf(schedule, steps, guided) {
  return Array.from({ length: steps }, (_, step) => phaseOf(schedule, step, steps, guided));
}

/** The same for the plain pipeline: everything is computed, in every step. */
export function plainPlan(steps, guided) {
  return Array.from({ length: steps }, () => phase(guided));
}

/** The phase whose graph serves `given`: it hands on all that any phase with these inputs does, at any step. */
export function graphPhase(schedule, given) {
  const cross = schedule.gate_step === null ? [] : ["cross"];
  const deep = schedule.deepcache_interval > 1 ? ["deep"] : [];
  const improving = schedule.fi_interval > 1 ? ["self"] : [];
  const planning = schedule.sp_interval > 1 ? ["self"] : [];
  if (given.reuse.some((kind) => kind !== "cross")) return phase(given.guided, { reuse: given.reuse });
  if (given.reuse.length) return phase(given.guided, { emit: union(deep, improving), reuse: given.reuse });
  const atGate = union(cross, improving);
  if (given.guided) return phase(true, { emit: union(deep, planning), merge: atGate });
  return phase(false, { emit: union(deep, planning, atGate) });
}

function phaseOf(schedule, step, steps, guidedAtFirst) {
  const gate = gateOf(schedule, steps);
  if (step >= gate) {
    const { reuse, emit } = afterGate(schedule, step, gate);
    return phase(false, { emit, reuse: union(reuse, ["cross"]) });
  }
  const guidanceEnd = stepOf(schedule.guidance_step, steps), guided = guidedAtFirst && step < guidanceEnd;
  const { reuse, emit } = beforeGate(schedule, step, gate, step >= guidanceEnd ? guidanceEnd : 0);
  const atGate = schedule.fi_interval > 1 ? ["cross", "self"] : ["cross"];
  const handedOn = schedule.gate_step !== null && step === gate - 1 ? atGate : [];
  return guided ? phase(true, { emit, merge: handedOn, reuse }) : phase(false, { emit: union(emit, handedOn), reuse });
}

/** By the authors' rules; DeepCache counts from step `restart`. */
function beforeGate(schedule, step, gate, restart) {
  const last = schedule.gate_step !== null && step === gate - 1;
  if (schedule.deepcache_interval > 1) {
    return computedOrReused("deep", last || (step - restart) % schedule.deepcache_interval === 0);
  }
  if (schedule.sp_interval === 1 || step < schedule.warm_up || last) return { reuse: [], emit: [] };
  return computedOrReused("self", step === schedule.warm_up || step % schedule.sp_interval === 0);
}

function afterGate(schedule, step, gate) {
  if (schedule.deepcache_interval > 1) return computedOrReused("deep", (step - gate) % schedule.deepcache_interval === 0);
  if (schedule.fi_interval === 1) return { reuse: [], emit: [] };
  return computedOrReused("self", step % schedule.fi_interval === 0);
}

function computedOrReused(kind, computed) {
  return computed ? { reuse: [], emit: [kind] } : { reuse: [kind], emit: [] };
}

function stepOf(given, steps) {
  if (given === null) return steps;
  return Number.isInteger(given) ? given : Math.max(1, roundToEven(given * steps));
}

function union(...kinds) {
  return [...new Set(kinds.flat())];
}
