/**
 * Runs a pipeline in a worker, for pages:
 *
 *     const engine = new Engine();
 *     await engine.open({ bundle: "bundle/", runtime: "runtime/" });
 *     const { pixels, width, height } = await engine.generate({ prompt: "a large red circle", seed: 0 });
 *
 * Settings and arguments are those of the methods of `BundlePipeline`, except that callbacks are events.
 */

import { BundleError } from "./errors.js";

export class Engine {
  #worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  #calls = new Map();
  #count = 0;

  constructor() {
    this.#worker.addEventListener("message", ({ data }) => this.#receive(data));
    this.#worker.addEventListener("error", (event) => {
      event.preventDefault();
      this.#failAll(new BundleError(`The page's worker could not be started: ${event.message ?? "its script could not be loaded"}.`));
    });
  }

  /** Open a bundle. `on` has a callback for the event `bytes`. Throws BundleError. */
  open(settings, on = {}) {
    return this.#call("open", { from: document.baseURI, ...settings }, on);
  }

  /** Generate an image. `on` has callbacks by event: `step`, `preview` (with `preview: true`), `stage`, `cut`. Throws BundleError. */
  generate(call, on = {}) {
    return this.#call("generate", call, on);
  }

  /** Generate the images of two calls, whose steps alternate; `step` and `preview` have the position of the call, `turn`. */
  compare(calls, on = {}) {
    return this.#call("compare", calls, on);
  }

  /** Stop the worker, and free its memory. Unfinished calls are rejected with an AbortError. */
  close() {
    this.#worker.terminate();
    this.#failAll(new DOMException("Stopped.", "AbortError"));
  }

  #call(method, argument, on) {
    const id = this.#count++;
    return new Promise((resolve, reject) => {
      this.#calls.set(id, { resolve, reject, on });
      this.#worker.postMessage({ id, method, argument });
    });
  }

  #receive({ id, event, detail, result, error }) {
    const call = this.#calls.get(id);
    if (event) {
      call.on[event]?.(detail);
      return;
    }
    this.#calls.delete(id);
    if (error) call.reject(Object.assign(new BundleError(error.message), { name: error.name }));
    else call.resolve(result);
  }

  #failAll(error) {
    for (const { reject } of this.#calls.values()) reject(error);
    this.#calls.clear();
  }
}
