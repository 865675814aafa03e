/** Run the denoiser of a bundle: choose the graph of each step, and pass the caches on. Like `runtime/_denoiser.py`. */

import { BundleError } from "./errors.js";
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
  #caches = new Map();
  #made = new Map();

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
   * graph of the step must be open.
   */
  async run(step, latents, shape, timestep, guidanceScale) {
    const { phase } = this.plan[step], [, graph] = this.#graphs[step];
    const feeds = {};
    for (const spec of graph.inputs) feeds[spec.name] = this.#argument(spec, latents, shape, timestep, phase.guided);
    for (const spec of graph.cache_inputs) feeds[spec.name] = this.#caches.get(`${spec.kind} ${spec.site}`);
    const kept = graph.cache_outputs.filter((spec) => phase[spec.merged ? "merge" : "emit"].includes(spec.kind));
    const [output] = graph.outputs;
    const results = await this.#sessions.get(graph.file).run(feeds, [output.name, ...kept.map((spec) => spec.name)]);
    for (const spec of kept) this.#keep(`${spec.kind} ${spec.site}`, results[spec.name]);
    const prediction = floats(results[output.name]), size = latents.length;
    if (!phase.guided) return prediction.subarray(0, size); // further channels are a learned variance
    const half = prediction.length / 2, [first] = this.#manifest.family.order;
    const at = first === "uncond" ? [0, half] : [half, 0];
    return Float32Array.from({ length: size }, (_, i) => {
      const uncond = prediction[at[0] + i], cond = prediction[at[1] + i];
      return uncond + guidanceScale * (cond - uncond);
    });
  }

  /** Release the caches, which may be on the GPU. */
  release() {
    for (const value of this.#caches.values()) value.dispose();
    this.#caches.clear();
  }

  #keep(key, value) {
    this.#caches.get(key)?.dispose();
    this.#caches.set(key, value);
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

function repeated(values, count) {
  const all = new Float32Array(count * values.length);
  for (let i = 0; i < count; i++) all.set(values, i * values.length);
  return all;
}
