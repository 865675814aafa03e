/** Run the denoiser of a bundle: choose the graph of each step, and pass the caches on. Like `runtime/_denoiser.py`. */

import { Decider, forecastWeights } from "./decisions.js";
import { BundleError } from "./errors.js";
import { earlyGraphs, orderOf } from "./manifest.js";
import { tensor } from "./session.js";
import { floats } from "./text.js";

/** The denoiser of one generation of one image, which is called for each step in order. */
export class Denoiser {
  #manifest;
  #runtime;
  #sessions;
  #conditions;
  #guided;
  #names;
  #decider;
  #settled = new Map(); // by step that was decided at run time: the graph that ran last, and the letter
  #caches = new Map(); // the last values of each site, `{step, value}`, newest first
  #made = new Map();
  #early = new Map(); // by graph: the values of its prelude ("prelude"), and the rows of its table by timestep

  /**
   * `plan` is a plan of `schedule.js`; `conditions` are the inputs other than latents and timesteps, `{values, shape}`, by
   * guidance half and source. Throws BundleError if the bundle has no graph for a step.
   */
  constructor(manifest, runtime, sessions, plan, conditions) {
    this.#manifest = manifest;
    this.#runtime = runtime;
    this.#sessions = sessions;
    this.#conditions = conditions;
    this.#guided = "uncond" in conditions;
    this.plan = plan;
    this.#names = graphsOf(manifest, plan);
    const { rule } = manifest.method;
    this.#decider = rule ? new Decider(rule) : null;
  }

  /** Return the graph that served `step` and the letter of the step, `{graph, letter}`, once it has run. */
  ran(step) {
    return this.#settled.get(step) ?? { graph: this.#names[step][0], letter: this.plan[step].letter };
  }

  /** Return the manifest's descriptions of the graphs that may serve the steps from `step` on, up to `end`. */
  graphs(step, end = this.plan.length) {
    return [...new Set(this.#names.slice(step, end).flat())].map((name) => this.#manifest.graphs[name]);
  }

  /**
   * Return the prediction for `latents`, Float32Array of `shape` [1, channels, h, w], with guidance if the step has it. The
   * graphs of the step must be open, and `prepare` must have run their preludes and tables.
   */
  async run(step, latents, shape, timestep, guidanceScale) {
    const { phase } = this.plan[step], call = { step, latents, shape, timestep };
    let prediction;
    if (isDecided(phase)) prediction = await this.#decided(call);
    else {
      const ran = await this.#ran(this.#names[step][0], call, phase);
      this.#keep(ran.kept, step);
      this.#decider?.computed();
      prediction = ran.output;
    }
    const size = latents.length;
    if (!phase.guided) return prediction.subarray(0, size); // further channels are a learned variance
    const half = prediction.length / 2, [first] = this.#manifest.family.order;
    const at = first === "uncond" ? [0, half] : [half, 0];
    return Float32Array.from({ length: size }, (_, i) => {
      const uncond = prediction[at[0] + i], cond = prediction[at[1] + i];
      return uncond + guidanceScale * (cond - uncond);
    });
  }

  /** Run all graphs that may serve `step`, and discard what they return: the first runs of a graph take longer. */
  async warmUp(step, latents, shape, timestep) {
    const { phase } = this.plan[step], call = { step, latents, shape, timestep }, [first, ...others] = this.#names[step];
    const { kept } = await this.#ran(first, call, isDecided(phase) ? headOf(phase) : phase);
    if (isDecided(phase)) {
      this.#keep(kept.filter(isState), step);
      for (const name of others) {
        const ran = await this.#ran(name, call, name === this.plan[step].tail ? tailOf(phase) : finishOf(phase));
        for (const { value } of ran.kept) value.dispose();
      }
      this.#releaseState();
    }
    for (const each of kept) if (!isDecided(phase) || !isState(each)) each.value.dispose();
  }

  /** Run the head of a step, and the tail or the finish, as the measure decides. */
  async #decided(call) {
    const { step } = call, { phase, tail, finish, settled } = this.plan[step], { rule } = this.#manifest.method;
    const head = await this.#ran(this.#names[step][0], call, headOf(phase));
    const skipped = this.#decider.skips(head.output[0]), graph = skipped ? finish : tail;
    this.#settled.set(step, { graph, letter: settled[Number(skipped)] });
    this.#keep(head.kept.filter(isState), step);
    const rest = await this.#ran(graph, call, skipped ? finishOf(phase) : tailOf(phase));
    const measured = head.kept.filter((each) => !isState(each));
    if (!skipped || rule.since === "previous") this.#keep(measured, step);
    else for (const { value } of measured) value.dispose();
    this.#keep(rest.kept, step);
    this.#releaseState();
    return rest.output;
  }

  /** Run the graph `name`, and return its first output and the values that `phase` keeps, `{spec, value}`. */
  async #ran(name, { step, latents, shape, timestep }, phase) {
    const graph = this.#manifest.graphs[name], feeds = {};
    for (const spec of graph.inputs) feeds[spec.name] = this.#argument(spec, latents, shape, timestep, phase.guided);
    const early = this.#early.get(name), values = { ...early?.get("prelude"), ...early?.get(timestep) };
    for (const spec of graph.early_inputs ?? []) feeds[spec.name] = values[spec.name];
    for (const spec of graph.cache_inputs) feeds[spec.name] = this.#cached(spec, step);
    const kept = graph.cache_outputs.filter((spec) => phase[spec.merged ? "merge" : "emit"].includes(spec.kind));
    const [output] = graph.outputs;
    const results = await this.#sessions.get(graph.file).run(feeds, [output.name, ...kept.map((spec) => spec.name)]);
    return { output: floats(results[output.name]), kept: kept.map((spec) => ({ spec, value: results[spec.name] })) };
  }

  /** Return the cached value for `step`, forecast from those of earlier steps if the plan, or a decided step, says so. */
  #cached(spec, step) {
    const held = this.#caches.get(keyOf(spec)), { phase, weights = {} } = this.plan[step];
    const isOpen = isDecided(phase) && phase.decided.includes(spec.kind);
    const of = isOpen ? forecastWeights(held.map((one) => one.step), step) : weights[spec.kind];
    if (of === undefined || of.length === 1) return held[0].value;
    return forecast(this.#runtime, spec, held.map(({ value }) => value), of);
  }

  /** Return the manifest's descriptions of the preludes and tables of the graphs of `step` that must run before it. */
  missing(step, timestep) {
    const { graphs } = this.#manifest;
    return this.#names[step].flatMap((name) => {
      const made = this.#early.get(name) ?? new Map(), parts = earlyGraphs(graphs, name).map((part) => graphs[part]);
      return parts.some(({ stage }) => !made.has(stage === "table" ? timestep : stage)) ? parts : [];
    });
  }

  /**
   * Run the preludes and tables of the graphs of `step`, which must be open, as far as their values are missing: a prelude
   * once, a table for each of `timesteps`. Values that no later step takes are released.
   */
  async prepare(step, latents, shape, timesteps) {
    const { graphs } = this.#manifest, { guided } = this.plan[step].phase, needed = new Set(this.#names.slice(step).flat());
    for (const other of [...this.#early.keys()].filter((one) => !needed.has(one))) this.#releaseEarly(other);
    for (const name of this.#names[step]) {
      if (!this.#early.has(name)) this.#early.set(name, new Map());
      const made = this.#early.get(name);
      for (const part of earlyGraphs(graphs, name).map((one) => graphs[one])) {
        for (const key of part.stage === "table" ? timesteps : [part.stage]) {
          if (made.has(key)) continue;
          const feeds = {};
          for (const spec of part.inputs) feeds[spec.name] = this.#argument(spec, latents, shape, key, guided);
          for (const spec of part.early_inputs) feeds[spec.name] = made.get("prelude")[spec.name];
          made.set(key, await this.#sessions.get(part.file).run(feeds, part.outputs.map((spec) => spec.name)));
        }
      }
    }
  }

  /** Release the caches and the values of preludes and tables, which may be on the GPU. */
  release() {
    for (const held of this.#caches.values()) for (const { value } of held) value.dispose();
    this.#caches.clear();
    for (const name of [...this.#early.keys()]) this.#releaseEarly(name);
  }

  /** Release the values of the preludes and tables of the graphs of `step`. */
  forget(step) {
    for (const name of this.#names[step]) this.#releaseEarly(name);
  }

  #releaseEarly(name) {
    for (const values of this.#early.get(name).values()) for (const value of Object.values(values)) value.dispose();
    this.#early.delete(name);
  }

  /** Release the values that the head of a step hands to the tail or the finish. */
  #releaseState() {
    for (const [key, held] of this.#caches) {
      if (!key.startsWith("state ")) continue;
      for (const { value } of held) value.dispose();
      this.#caches.delete(key);
    }
  }

  /**
   * Keep values of `step`, `{spec, value}`, and as many older ones of the same shape as forecasts need. Where steps are
   * decided, values from before a gate do not count after it.
   */
  #keep(kept, step) {
    const isGated = (one) => this.plan[one].phase.reuse.includes("cross");
    for (const { spec, value } of kept) {
      const key = keyOf(spec), held = this.#caches.get(key) ?? [];
      const counts = (old) => String(old.value.dims) === String(value.dims) && (!this.#decider || isGated(old.step) === isGated(step));
      const older = held.filter(counts).slice(0, orderOf(this.#manifest, spec.kind));
      for (const old of held) if (!older.includes(old)) old.value.dispose();
      this.#caches.set(key, [{ step, value }, ...older]);
    }
  }

  #argument(spec, latents, shape, timestep, guided) {
    const source = this.#manifest.components.arguments[spec.name], halves = this.#halves(guided), count = halves.length;
    if (source === "latents") return tensor(this.#runtime, spec, repeated(latents, count), [count, ...shape.slice(1)]);
    if (source === "timestep") {
      const dims = spec.shape.map(() => count); // a scalar, or one value per row
      return tensor(this.#runtime, spec, Array(dims.length ? count : 1).fill(timestep), dims);
    }
    const key = `${guided} ${spec.name}`;
    if (!this.#made.has(key)) {
      const parts = halves.map((half) => this.#conditions[half][source]);
      const values = parts.flatMap(({ values }) => Array.from(values)), [, ...rest] = parts[0].shape;
      this.#made.set(key, tensor(this.#runtime, spec, values, [count, ...rest]));
    }
    return this.#made.get(key);
  }

  #halves(guided) {
    if (guided) return this.#manifest.family.order;
    return this.#guided ? [this.#manifest.method.keep] : ["cond"];
  }
}

/**
 * Return the names of the graphs of each step of `plan`: one, or the head, the tail and the finish of a step that is decided
 * at run time. Throws BundleError if the bundle has no graph for a step.
 */
export function graphsOf(manifest, plan) {
  return plan.map(({ graph, phase, tail, finish }) => {
    if (graph === null) {
      throw new BundleError(
        `The bundle has no graph for a step of this call (${phase.reuse.join(" and ") || "nothing"} reused, ` +
          `${phase.guided ? "with" : "without"} guidance). It has ${Object.keys(manifest.graphs).join(", ")}.`,
      );
    }
    return isDecided(phase) ? [graph, tail, finish] : [graph];
  });
}

const keyOf = (spec) => `${spec.kind} ${spec.site}`;
const isDecided = (phase) => Boolean(phase.decided?.length);
const isState = ({ spec }) => spec.kind === "state";

// What the graphs of a step that is decided at run time keep, in the form of a phase.
const headOf = ({ guided }) => ({ guided, emit: ["measured", "state"], merge: [] });
const tailOf = ({ guided, decided }) => ({ guided, emit: decided, merge: [] });
const finishOf = ({ guided }) => ({ guided, emit: [], merge: [] });

/** Return the values of a site added up with `weights`, newest first, in single precision. */
export function forecast(runtime, spec, held, weights) {
  const values = weights.map((_, i) => floats(held[i])), limit = spec.dtype === "float16" ? 65504 : 3.4028234663852886e38;
  const total = Float32Array.from(values[0], (_, at) => {
    const sum = weights.reduce((sum, weight, i) => Math.fround(sum + Math.fround(Math.fround(weight) * values[i][at])), 0);
    return Math.min(Math.max(sum, -limit), limit);
  });
  return tensor(runtime, spec, total, held[0].dims);
}

function repeated(values, count) {
  const all = new Float32Array(count * values.length);
  for (let i = 0; i < count; i++) all.set(values, i * values.length);
  return all;
}
