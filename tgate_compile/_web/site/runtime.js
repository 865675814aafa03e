/** Load onnxruntime-web from the site's own folder. */

import { BundleError } from "./errors.js";
import { fetched } from "./files.js";
import { watchHeap } from "./heap.js";

/** The files for each provider: the module, and the WebAssembly that it loads. */
const BUILDS = {
  wasm: { module: "ort.wasm.min.mjs", binary: "ort-wasm-simd-threaded" },
  webgpu: { module: "ort.webgpu.min.mjs", binary: "ort-wasm-simd-threaded.asyncify" },
};

/** Return whether threads are available, which needs the headers that isolate the page. */
export const canUseThreads = () => globalThis.crossOriginIsolated === true;

/** Return the default number of threads: half of the cores, at most 4, as in ONNX Runtime. */
export function defaultThreads() {
  return canUseThreads() ? Math.min(4, Math.max(1, Math.ceil((navigator.hardwareConcurrency || 1) / 2))) : 1;
}

/** Load ONNX Runtime for `provider`, "wasm" or "webgpu", from the folder at `base`. */
export async function loadRuntime(base, { provider = "wasm", threads = defaultThreads(), onBytes } = {}) {
  if (!Object.hasOwn(BUILDS, provider)) throw new BundleError(`provider must be "wasm" or "webgpu", but got ${JSON.stringify(provider)}.`);
  if (provider === "webgpu" && !(await navigator.gpu?.requestAdapter())) {
    throw new BundleError("This browser has no WebGPU adapter. Choose WebAssembly.");
  }
  watchHeap();
  const { module, binary } = BUILDS[provider];
  const ort = await import(new URL(module, base).href);
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = canUseThreads() ? threads : 1;
  ort.env.wasm.wasmPaths = { mjs: new URL(`${binary}.mjs`, base).href, wasm: new URL(`${binary}.wasm`, base).href };
  ort.env.wasm.wasmBinary = await fetched(new URL(`${binary}.wasm`, base), onBytes);
  return { ort, provider, threads: ort.env.wasm.numThreads };
}
