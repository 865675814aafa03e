/**
 * Runs a bundle as a text-to-image program with onnxruntime-web, like `runtime/_pipeline.py`, for one image at a time.
 *
 *     const pipe = await BundlePipeline.open("bundle/", { runtime: "runtime/" });
 *     const { pixels, width, height } = await pipe.generate({ prompt: "a large red circle" });
 *
 * A step blocks its thread, so it is better to use this in a worker, as `engine.js` does.
 */

import { Files } from "./files.js";
import { Generation } from "./generation.js";
import { heapBytes } from "./heap.js";
import { readManifest, orderOf } from "./manifest.js";
import { loadRuntime } from "./runtime.js";
import { Sessions } from "./session.js";
import { Prompts } from "./text.js";

/** Previews are shown as long as one takes less time than this. */
const PREVIEW_SECONDS = 0.15;

export class BundlePipeline {
  #parts;

  /** Use `open`. */
  constructor(manifest, runtime, files, sequential) {
    const sessions = new Sessions(runtime, files, (kind) => orderOf(manifest, kind) > 0), prompts = new Prompts(manifest.components, files, sessions, runtime);
    this.#parts = { manifest, runtime, sessions, prompts, sequential };
  }

  /**
   * Open the bundle at `base`, with ONNX Runtime from the folder `runtime`; addresses are relative to `from`.
   *
   * provider: "wasm" or "webgpu". threads: the number of WebAssembly threads, if the page is isolated. sequential: keep only
   * one graph loaded at a time, which takes less memory and more time. onBytes: called with the length of each piece that
   * arrives. Throws BundleError if this page cannot run the bundle.
   */
  static async open(base, { runtime, provider, threads, sequential = false, onBytes, from = globalThis.location?.href } = {}) {
    const folder = new URL(base, from);
    const manifest = await readManifest(new URL("manifest.json", folder));
    const loaded = await loadRuntime(new URL(runtime, from), { provider, threads, onBytes });
    return new BundlePipeline(manifest, loaded, new Files(folder, manifest.files, onBytes), sequential);
  }

  /** The number of threads. */
  get threads() {
    return this.#parts.runtime.threads;
  }

  /**
   * Generate an image for `prompt`: `{pixels, width, height}` and measurements. The defaults are those in the manifest.
   *
   * seed: the seed of the noise. latents: normal noise, Float32Array of [1, channels, h, w], instead of a seed. gateStep:
   * another gate step than the bundle's. plain: compute all steps in full, without reusing anything. The other arguments
   * are negativePrompt, steps and guidanceScale, and callbacks: onStep({step, steps, graph, letter, seconds}),
   * onPreview({pixels, width, height}), onStage(text), and onCut(tokens) if the prompt is truncated.
   */
  async generate(call) {
    const [result] = await this.#made([call]);
    return result;
  }

  /**
   * Generate the images of two calls with the same number of steps. Their steps alternate, so that other activity on the
   * device affects both equally; with `sequential`, one image follows the other.
   */
  async compare(calls) {
    if (!this.#parts.sequential) return this.#made(calls);
    const results = [];
    for (const call of calls) results.push(...(await this.#made([call])));
    return results;
  }

  async #made(calls) {
    const generations = calls.map((call) => new Generation(this.#parts, call)), previews = calls.map(() => 0);
    const graphs = generations.flatMap((generation) => generation.graphs); // together, so that weights are fetched once
    for (const generation of generations) await generation.begin(graphs);
    for (let step = 0; step < generations[0].steps; step++) {
      const turns = step % 2 ? [...generations.keys()].reverse() : [...generations.keys()];
      for (const turn of turns) await generations[turn].step();
      for (const turn of turns) previews[turn] = await this.#preview(calls[turn], generations[turn], previews[turn]);
    }
    const results = [];
    for (const generation of generations) results.push(await generation.finish());
    return results.map((result) => ({ ...result, heapBytes: heapBytes(), threads: this.threads }));
  }

  /** Show a preview unless the last one took too long, and return its duration in seconds. */
  async #preview({ onPreview }, generation, seconds) {
    const isLast = generation.done.length === generation.steps, isFirst = generation.done.length === 1;
    if (!onPreview || this.#parts.sequential || isLast || seconds > PREVIEW_SECONDS) return seconds;
    const began = performance.now();
    onPreview(await generation.image());
    return isFirst ? 0 : (performance.now() - began) / 1000; // the first one warms up
  }
}
