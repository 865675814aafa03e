/** Run ONNX files in ONNX Runtime. Like `runtime/_session.py`. */

import { BundleError } from "./errors.js";
import { toFloat16 } from "./float16.js";

const TYPED = { float32: Float32Array, int64: BigInt64Array, int32: Int32Array, bool: Uint8Array };

/** An open file, with the inputs and outputs that the manifest describes. */
class Session {
  /** Whether it has not run yet, so that its first run also compiles, allocates and warms up. */
  fresh = true;
  #inner;

  constructor(inner) {
    this.#inner = inner;
  }

  /** Run the graph on `feeds`, tensors by name, and return the outputs called `names`, also by name. */
  async run(feeds, names) {
    return this.#inner.run(feeds, names);
  }

  async release() {
    await this.#inner.release();
  }
}

/**
 * The open files of a bundle. Files with the same weights file are opened together if possible, so that it is fetched only
 * once; each session has a copy of the weights that it uses in WebAssembly's memory.
 */
export class Sessions {
  #runtime;
  #files;
  #isForecast;
  #open = new Map();

  /** `isForecast` returns whether cached values of a kind are forecast, which happens outside of the graphs. */
  constructor(runtime, files, isForecast = () => false) {
    this.#runtime = runtime;
    this.#files = files;
    this.#isForecast = isForecast;
  }

  /** Open those of `graphs`, as described in the manifest, that are not open yet, and return the time taken in seconds. */
  async open(graphs, weights) {
    const missing = graphs.filter((graph, i) => !this.#open.has(graph.file) && graphs.findIndex((one) => one.file === graph.file) === i);
    if (!missing.length) return 0;
    const began = performance.now();
    const data = await this.#files.bytes(weights);
    for (const graph of missing) this.#open.set(graph.file, await this.#opened(graph, weights, data));
    return (performance.now() - began) / 1000;
  }

  /** Return the session of an open file. */
  get(file) {
    return this.#open.get(file);
  }

  /** Release all sessions except those of `graphs`. */
  async keepOnly(graphs) {
    for (const [file, session] of this.#open) {
      if (graphs.some((graph) => graph.file === file)) continue;
      this.#open.delete(file);
      await session.release();
    }
  }

  async #opened(graph, weights, data) {
    const { ort, provider } = this.#runtime;
    const isEarly = graph.stage === "prelude" || graph.stage === "table";
    const reused = (graph.cache_outputs ?? []).filter((spec) => !this.#isForecast(spec.kind));
    const kept = (isEarly ? graph.outputs : reused).map((spec) => [spec.name, "gpu-buffer"]);
    let inner;
    try {
      inner = await ort.InferenceSession.create(await this.#files.bytes(graph.file), {
        executionProviders: [provider],
        logSeverityLevel: 3, // the warnings are about the placement of operators
        externalData: [{ path: weights.split("/").pop(), data }],
        // Caches, unless they are forecast, and the values of preludes and tables stay on the GPU from step to step.
        preferredOutputLocation: provider === "webgpu" && kept.length ? Object.fromEntries(kept) : undefined,
      });
    } catch (error) {
      if (error instanceof BundleError) throw error;
      throw new BundleError(`ONNX Runtime could not open ${graph.file} (${error.message ?? error}).`);
    }
    const given = [inner.inputNames, inner.outputNames].map((names) => names.join(" "));
    const expected = [
      [...graph.inputs, ...(graph.early_inputs ?? []), ...(graph.cache_inputs ?? [])],
      [...graph.outputs, ...(graph.cache_outputs ?? [])],
    ].map((specs) => specs.map((spec) => spec.name).join(" "));
    if (given.join("; ") !== expected.join("; ")) {
      throw new BundleError(`${graph.file} has the inputs and outputs ${given.join("; ")}, but the manifest says ${expected.join("; ")}.`);
    }
    return new Session(inner);
  }
}

/** Return `values` as a tensor with the dtype of `spec`. */
export function tensor(runtime, spec, values, shape) {
  if (spec.dtype === "float16") return new runtime.ort.Tensor("float16", toFloat16(values), shape);
  const convert = spec.dtype === "int64" ? BigInt : Number;
  const typed = values instanceof TYPED[spec.dtype] ? values : TYPED[spec.dtype].from(values, convert);
  return new runtime.ort.Tensor(spec.dtype, typed, shape);
}
