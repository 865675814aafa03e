/**
 * A bundle as a text-to-image program, on onnxruntime-web. As `runtime/_pipeline.py`, for one image at a time.
 *
 *     const pipe = await BundlePipeline.open("bundle/", { runtime: "runtime/" });
 *     const { pixels, width, height } = await pipe.generate({ prompt: "a large red circle" });
 *
 * Better in a worker, since a step holds up whatever runs beside it: `engine.js` does that.
 */

import { Files } from "./files.js";
import { Generation } from "./generation.js";
import { heapBytes } from "./heap.js";
import { readManifest } from "./manifest.js";
import { loadRuntime } from "./runtime.js";
import { Sessions } from "./session.js";
import { Prompts } from "./text.js";

/** Images between the steps are made as long as one takes less than this. */
const PREVIEW_SECONDS = 0.15;

export class BundlePipeline {
  #parts;

  /** Use `open`. */
  constructor(manifest, runtime, files, sequential) {
    const sessions = new Sessions(runtime, files), prompts = new Prompts(manifest.components, files, sessions, runtime);
    this.#parts = { manifest, runtime, sessions, prompts, sequential };
  }

  /**
   * The bundle at `base`, with ONNX Runtime from the folder `runtime`; addresses are relative to `from`.
   *
   * provider: "wasm" or "webgpu". threads: of WebAssembly, where the page is isolated. sequential: each graph is loaded when
   * it is needed and let go when it is not, which takes less memory and more time. onBytes is told of each piece that arrives.
   * Throws BundleError for a bundle that this page cannot run.
   */
  static async open(base, { runtime, provider, threads, sequential = false, onBytes, from = globalThis.location?.href } = {}) {
    const folder = new URL(base, from);
    const manifest = await readManifest(new URL("manifest.json", folder));
    const loaded = await loadRuntime(new URL(runtime, from), { provider, threads, onBytes });
    return new BundlePipeline(manifest, loaded, new Files(folder, manifest.files, onBytes), sequential);
  }

  /** How many threads there are. */
  get threads() {
    return this.#parts.runtime.threads;
  }

  /**
   * An image of `prompt`: `{pixels, width, height}` and how it was made. What is not given is as the manifest says.
   *
   * seed: of the noise. latents: normal noise, Float32Array of [1, channels, h, w], in the place of a seed. gateStep: another
   * gate than the bundle's. plain: all steps in full, with guidance, and nothing reused. negativePrompt, steps and
   * guidanceScale are what they are called. Each of these may be called between the steps:
   * onStep({step, steps, graph, letter, seconds}), onPreview({pixels, width, height}), onStage(text), and onCut(tokens) if
   * the end of the prompt is left out.
   */
  async generate(call) {
    const [result] = await this.#made([call]);
    return result;
  }

  /**
   * The images of two calls with as many steps. They take turns step by step, so that whatever else happens on the device
   * happens to both; with `sequential`, one comes after the other.
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

  /** Shows what there is, unless that took too long last time; how long it took now. */
  async #preview({ onPreview }, generation, seconds) {
    const isLast = generation.done.length === generation.steps, isFirst = generation.done.length === 1;
    if (!onPreview || this.#parts.sequential || isLast || seconds > PREVIEW_SECONDS) return seconds;
    const began = performance.now();
    onPreview(await generation.image());
    return isFirst ? 0 : (performance.now() - began) / 1000; // the first one warms up
  }
}
