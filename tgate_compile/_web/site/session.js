/** ONNX files in ONNX Runtime, opened when they are needed. As `runtime/_session.py`. */

import { BundleError } from "./errors.js";
import { toFloat16 } from "./float16.js";

const TYPED = { float32: Float32Array, int64: BigInt64Array, int32: Int32Array, bool: Uint8Array };

/** One opened file, whose inputs and outputs are those that the manifest says. */
class Session {
  /** It has not run yet, so that its first run also compiles, allocates and warms up. */
  fresh = true;
  #inner;

  constructor(inner) {
    this.#inner = inner;
  }

  /** The outputs named `wanted`, tensors by name, for `feeds`, likewise. */
  async run(feeds, wanted) {
    return this.#inner.run(feeds, wanted);
  }

  async release() {
    await this.#inner.release();
  }
}

/**
 * The open files of a bundle. Files of one weights file are opened together where possible, since its bytes are then
 * fetched once; each session has a copy of what it uses in WebAssembly's memory.
 */
export class Sessions {
  #runtime;
  #files;
  #open = new Map();

  constructor(runtime, files) {
    this.#runtime = runtime;
    this.#files = files;
  }

  /** Open those of `graphs` (with `file`, `inputs`, `outputs` and so on, as in the manifest) that are not; seconds taken. */
  async open(graphs, weights) {
    const missing = graphs.filter((graph, i) => !this.#open.has(graph.file) && graphs.findIndex((one) => one.file === graph.file) === i);
    if (!missing.length) return 0;
    const began = performance.now();
    const data = await this.#files.bytes(weights);
    for (const graph of missing) this.#open.set(graph.file, await this.#opened(graph, weights, data));
    return (performance.now() - began) / 1000;
  }

  /** The session of a file that is open. */
  get(file) {
    return this.#open.get(file);
  }

  /** Release those that are not among `graphs`. */
  async keepOnly(graphs) {
    for (const [file, session] of this.#open) {
      if (graphs.some((graph) => graph.file === file)) continue;
      this.#open.delete(file);
      await session.release();
    }
  }

  async #opened(graph, weights, data) {
    const { ort, provider } = this.#runtime;
    const caches = (graph.cache_outputs ?? []).map((spec) => [spec.name, "gpu-buffer"]);
    let inner;
    try {
      inner = await ort.InferenceSession.create(await this.#files.bytes(graph.file), {
        executionProviders: [provider],
        logSeverityLevel: 3, // its warnings are about its own placement of operators
        externalData: [{ path: weights.split("/").pop(), data }],
        // What one step hands to the next stays where it is.
        preferredOutputLocation: provider === "webgpu" && caches.length ? Object.fromEntries(caches) : undefined,
      });
    } catch (error) {
      if (error instanceof BundleError) throw error;
      throw new BundleError(`ONNX Runtime could not open ${graph.file} (${error.message ?? error}).`);
    }
    const given = [inner.inputNames, inner.outputNames].map((names) => names.join(" "));
    const expected = [
      [...graph.inputs, ...(graph.cache_inputs ?? [])],
      [...graph.outputs, ...(graph.cache_outputs ?? [])],
    ].map((specs) => specs.map((spec) => spec.name).join(" "));
    if (given.join("; ") !== expected.join("; ")) {
      throw new BundleError(`${graph.file} takes and returns ${given.join("; ")}, and the manifest says ${expected.join("; ")}.`);
    }
    return new Session(inner);
  }
}

/** `values` as the tensor that `spec` is. */
export function tensor(runtime, spec, values, shape) {
  if (spec.dtype === "float16") return new runtime.ort.Tensor("float16", toFloat16(values), shape);
  const convert = spec.dtype === "int64" ? BigInt : Number;
  const typed = values instanceof TYPED[spec.dtype] ? values : TYPED[spec.dtype].from(values, convert);
  return new runtime.ort.Tensor(spec.dtype, typed, shape);
}
