/** Read a bundle's manifest, and reject what this page does not support. docs/reference/bundle.md describes the format. */

import { BundleError } from "./errors.js";
import { makeScheduler } from "./schedulers.js";

export const SCHEMA_VERSION = 4;
/** The size of an element in bytes, by the manifest's names of the dtypes that this page supports. */
export const BYTES = { float32: 4, float16: 2, int64: 8, int32: 4, bool: 1 };
const SOURCES = ["latents", "timestep", "hidden_states", "attention_mask", "pooled", "sizes", "resolution", "aspect_ratio"];
const COMMAND = "`tgate-compile web --out DIR` writes a bundle that this page supports.";

/** Read and check the manifest at `url`. Throws BundleError. */
export async function readManifest(url) {
  let manifest;
  try {
    const response = await fetch(url, { cache: "no-store" });
    if (!response.ok) throw new Error(`${response.status} ${response.statusText}`.trim());
    manifest = await response.json();
  } catch (error) {
    throw new BundleError(`There is no bundle at ${url} (${error.message}). ${COMMAND}`);
  }
  checkManifest(manifest);
  return manifest;
}

/** Throw BundleError, which says why, if this page cannot run the bundle with this manifest. */
export function checkManifest(manifest) {
  if (manifest?.format !== "tgate_compile.bundle") {
    throw new BundleError(`This is not a bundle of tgate_compile: the format in its manifest is ${JSON.stringify(manifest?.format)}. ${COMMAND}`);
  }
  if (!(manifest.schema_version >= 1 && manifest.schema_version <= SCHEMA_VERSION)) {
    throw new BundleError(
      `The bundle's manifest has schema version ${manifest.schema_version}, but this page reads versions up to ${SCHEMA_VERSION} only. ` +
        "Write the page again with a newer tgate_compile.",
    );
  }
  if (manifest.graph_format !== "onnx") {
    throw new BundleError(`The bundle's graphs have the format ${JSON.stringify(manifest.graph_format)}, but browsers run only "onnx". ${COMMAND}`);
  }
  if (manifest.components === null) {
    throw new BundleError(
      "The bundle has only the denoiser, without text encoders and a VAE decoder. Export one with " +
        "`tgate-compile export --components all`.",
    );
  }
  if (manifest.family.calls.length) {
    throw new BundleError(
      `The bundle is from a ${manifest.pipeline.class_name}, which calls the denoiser once per guidance half; this page does not support that. ${COMMAND}`,
    );
  }
  if (manifest.method.schedule.guidance_similarity !== null) {
    throw new BundleError(`The bundle's guidance ends by similarity (guidance_similarity), which this page does not support. ${COMMAND}`);
  }
  if (!manifest.method.plans) {
    throw new BundleError("The bundle was written by an older tgate_compile, without the plans that this page needs. Export it again.");
  }
  const source = Object.values(manifest.components.arguments).find((one) => !SOURCES.includes(one));
  if (source !== undefined) throw new BundleError(`The bundle's denoiser needs ${JSON.stringify(source)}, which this page does not provide. ${COMMAND}`);
  checkDtypes(manifest);
  checkStages(manifest);
  checkBatch(manifest);
  checkFiles(manifest);
  makeScheduler(manifest.scheduler, manifest.components.num_inference_steps); // throws if it is not supported
}

/** Return the names of the prelude and the table of the graph `name`, if it has them, in this order. */
export function earlyGraphs(graphs, name) {
  const direct = (graphs[name].early_inputs ?? []).map((spec) => spec.graph);
  const all = new Set([...direct, ...direct.flatMap((one) => graphs[one].early_inputs.map((spec) => spec.graph))]);
  return [...all].sort((one, other) => graphs[one].stage.localeCompare(graphs[other].stage)); // prelude, table
}

/** Return the order of the forecast for the cached values of `kind`; 0 if they are reused as they are. */
export function orderOf({ method }, kind) {
  return method.forecasts?.[kind] ?? 0;
}

/** Return the size in bytes of the cached values for one image; 0 if nothing is cached. */
export function cacheBytes(manifest) {
  const sizes = Object.fromEntries(Object.entries(manifest.sizes).map(([name, size]) => [name, size.example]));
  const held = new Map();
  for (const graph of Object.values(manifest.graphs)) {
    for (const { kind, site, dtype, shape } of graph.cache_inputs) {
      const bytes = BYTES[dtype] * shapeAt(shape, sizes).reduce((product, size) => product * size, 1);
      const kept = bytes * (orderOf(manifest, kind) + 1);
      held.set(`${kind} ${site}`, Math.max(kept, held.get(`${kind} ${site}`) ?? 0));
    }
  }
  return [...held.values()].reduce((sum, bytes) => sum + bytes, 0);
}

/** Return `shape` with numbers, given the values of its free sizes. */
export function shapeAt(shape, sizes) {
  return shape.map((size) => (typeof size === "number" ? size : valueOf(size, sizes)));
}

/** Evaluate an expression such as `16*(h + 1)//2`: numbers, names, `+ - * //` and parentheses. */
function valueOf(text, sizes) {
  const tokens = text.match(/\d+|[a-z_]\w*|\/\/|[-+*()]/g) ?? [];
  const atom = () => {
    const token = tokens.shift();
    if (token === "-") return -atom();
    if (token !== "(") return /^\d/.test(token) ? Number(token) : sizes[token];
    const value = sum();
    tokens.shift();
    return value;
  };
  const product = () => {
    let value = atom();
    while (tokens[0] === "*" || tokens[0] === "//") value = tokens.shift() === "*" ? value * atom() : Math.floor(value / atom());
    return value;
  };
  const sum = () => {
    let value = product();
    while (tokens[0] === "+" || tokens[0] === "-") value = tokens.shift() === "+" ? value + product() : value - product();
    return value;
  };
  return sum();
}

function checkDtypes(manifest) {
  const { text_encoders: encoders, vae_decoder: decoder } = manifest.components;
  for (const graph of [...Object.values(manifest.graphs), ...encoders, decoder]) {
    for (const spec of [...graph.inputs, ...graph.outputs, ...(graph.early_inputs ?? []), ...(graph.cache_inputs ?? []), ...(graph.cache_outputs ?? [])]) {
      if (!Object.hasOwn(BYTES, spec.dtype)) {
        throw new BundleError(`${spec.name} of the bundle is ${spec.dtype}, which browsers do not support. Export the bundle in float32 or float16.`);
      }
    }
  }
}

/** Throw BundleError unless a prelude or a table of the bundle returns each value that a graph takes from one. */
function checkStages({ graphs }) {
  for (const [name, { stage, early_inputs: taken = [] }] of Object.entries(graphs)) {
    const wrong = taken.find((spec) => {
      const maker = graphs[spec.graph];
      const isEarlier = maker?.stage === "prelude" ? stage !== "prelude" : maker?.stage === "table" && stage === "step";
      return !isEarlier || !maker.outputs.some((output) => output.name === spec.name);
    });
    if (wrong) throw new BundleError(`The bundle's graph ${name} takes ${wrong.name} from ${wrong.graph}, which does not provide it.`);
  }
}

/** Throw BundleError unless the graphs can generate one image at a time. */
function checkBatch(manifest) {
  for (const graph of Object.values(manifest.graphs)) {
    const latents = graph.inputs.find((spec) => spec.name === manifest.denoiser.latents), rows = latents?.shape[0];
    if (typeof rows === "number" && rows !== (graph.phase.guided ? 2 : 1)) {
      throw new BundleError(
        `The bundle generates several images at a time, but this page generates only one: its latents have the shape ${JSON.stringify(latents.shape)}. ${COMMAND}`,
      );
    }
  }
}

/** Throw BundleError unless the manifest lists all files that it uses, all of them in the bundle's folder. */
function checkFiles(manifest) {
  const { text_encoders: encoders, vae_decoder: decoder, weights } = manifest.components;
  const used = [
    manifest.weights, weights, decoder.file,
    ...Object.values(manifest.graphs).map((graph) => graph.file),
    ...encoders.flatMap((encoder) => [encoder.file, encoder.tokenizer.file]),
  ];
  const missing = used.find((name) => !Object.hasOwn(manifest.files, name));
  if (missing !== undefined) throw new BundleError(`The bundle's manifest uses the file ${JSON.stringify(missing)}, but does not list it in "files".`);
  const outside = Object.keys(manifest.files).find((name) => !/^[^/\\:?#%]+(\/[^/\\:?#%]+)*$/.test(name) || name.split("/").some((part) => /^\.+$/.test(part)));
  if (outside !== undefined) throw new BundleError(`The bundle's manifest lists the file ${JSON.stringify(outside)}, which is not a plain path in its folder.`);
}
