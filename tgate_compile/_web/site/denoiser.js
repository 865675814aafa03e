/** Run the denoiser of a bundle: choose the graph of each step, and pass the caches on. Like `runtime/_denoiser.py`. */

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
  #graphs;
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
    this.#graphs = graphsOf(manifest, plan);
  }

  /** Return the name of the graph that serves `step`. */
  graphName(step) {
    return this.#graphs[step][0];
  }

  /** Return the manifest's descriptions of the graphs of the steps from `step` on. */
  graphsFrom(step) {
    return [...new Set(this.#graphs.slice(step).map(([, graph]) => graph))];
  }

  /** Return the manifest's description of the graph of `step`. */
  graph(step) {
    return this.#graphs[step][1];
  }

  /**
   * Return the prediction for `latents`, Float32Array of `shape` [1, channels, h, w], with guidance if the step has it. The
   * graph of the step must be open, and `prepare` must have run its prelude and its table.
   */
  async run(step, latents, shape, timestep, guidanceScale) {
    const { phase } = this.plan[step], [name, graph] = this.#graphs[step];
    const feeds = {};
    for (const spec of graph.inputs) feeds[spec.name] = this.#argument(spec, latents, shape, timestep, phase.guided);
    const early = this.#early.get(name), values = { ...early?.get("prelude"), ...early?.get(timestep) };
    for (const spec of graph.early_inputs ?? []) feeds[spec.name] = values[spec.name];
    const weights = this.plan[step].weights ?? {};
    for (const spec of graph.cache_inputs) {
      const held = this.#caches.get(`${spec.kind} ${spec.site}`), of = weights[spec.kind];
      feeds[spec.name] = of === undefined ? held[0].value : forecast(this.#runtime, spec, held.map(({ value }) => value), of);
    }
    const kept = graph.cache_outputs.filter((spec) => phase[spec.merged ? "merge" : "emit"].includes(spec.kind));
    const [output] = graph.outputs;
    const results = await this.#sessions.get(graph.file).run(feeds, [output.name, ...kept.map((spec) => spec.name)]);
    for (const spec of kept) this.#keep(spec, step, results[spec.name]);
    const prediction = floats(results[output.name]), size = latents.length;
    if (!phase.guided) return prediction.subarray(0, size); // further channels are a learned variance
    const half = prediction.length / 2, [first] = this.#manifest.family.order;
    const at = first === "uncond" ? [0, half] : [half, 0];
    return Float32Array.from({ length: size }, (_, i) => {
      const uncond = prediction[at[0] + i], cond = prediction[at[1] + i];
      return uncond + guidanceScale * (cond - uncond);
    });
  }

  /** Return the manifest's descriptions of the prelude and the table of the graph of `step` if they must run before it. */
  missing(step, timestep) {
    const [name] = this.#graphs[step], made = this.#early.get(name) ?? new Map(), { graphs } = this.#manifest;
    const parts = earlyGraphs(graphs, name).map((part) => graphs[part]);
    return parts.some(({ stage }) => !made.has(stage === "table" ? timestep : stage)) ? parts : [];
  }

  /**
   * Run the prelude and the table of the graph of `step`, which must be open, as far as their values are missing: the
   * prelude once, the table for each of `timesteps`. Values that no later step takes are released.
   */
  async prepare(step, latents, shape, timesteps) {
    const { graphs } = this.#manifest, [name] = this.#graphs[step], needed = new Set(this.#graphs.slice(step).map(([one]) => one));
    for (const other of [...this.#early.keys()].filter((one) => !needed.has(one))) this.#releaseEarly(other);
    if (!this.#early.has(name)) this.#early.set(name, new Map());
    const made = this.#early.get(name), { guided } = this.plan[step].phase;
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

  /** Release the caches and the values of preludes and tables, which may be on the GPU. */
  release() {
    for (const held of this.#caches.values()) for (const { value } of held) value.dispose();
    this.#caches.clear();
    for (const name of [...this.#early.keys()]) this.#releaseEarly(name);
  }

  /** Release the values of the prelude and the table of the graph of `step`. */
  forget(step) {
    this.#releaseEarly(this.#graphs[step][0]);
  }

  #releaseEarly(name) {
    for (const values of this.#early.get(name).values()) for (const value of Object.values(values)) value.dispose();
    this.#early.delete(name);
  }

  #keep(spec, step, value) {
    const key = `${spec.kind} ${spec.site}`, held = this.#caches.get(key) ?? [];
    if (held[0]?.step === step) held.shift().value.dispose(); // the step runs several times while a graph warms up
    held.unshift({ step, value });
    for (const old of held.splice(orderOf(this.#manifest, spec.kind) + 1)) old.value.dispose();
    this.#caches.set(key, held);
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

/** Return the name and the description of the graph of each step of `plan`. Throws BundleError if there is none. */
export function graphsOf(manifest, plan) {
  return plan.map(({ graph, phase }) => {
    if (graph === null) {
      throw new BundleError(
        `The bundle has no graph for a step of this call (${phase.reuse.join(" and ") || "nothing"} reused, ` +
          `${phase.guided ? "with" : "without"} guidance). It has ${Object.keys(manifest.graphs).join(", ")}.`,
      );
    }
    return [graph, manifest.graphs[graph]];
  });
}

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
