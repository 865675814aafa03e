/** A bundle's manifest: read, and refused where it asks for what is not on this page. The format is docs/reference/bundle.md. */

import { BundleError } from "./errors.js";
import { makeScheduler } from "./schedulers.js";

export const SCHEMA_VERSION = 1;
/** Bytes of an element, by the manifest's names of dtypes that this page hands to graphs. */
export const BYTES = { float32: 4, float16: 2, int64: 8, int32: 4, bool: 1 };
const SOURCES = ["latents", "timestep", "hidden_states", "attention_mask", "pooled", "sizes", "resolution", "aspect_ratio"];
const COMMAND = "`tgate-compile web --out DIR` writes one that this page runs.";

/** The manifest at `url`, checked. Throws BundleError. */
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

/** Throws BundleError, which says why, for a manifest of a bundle that this page cannot run. */
export function checkManifest(manifest) {
  if (manifest?.format !== "tgate_compile.bundle") {
    throw new BundleError(`This is no bundle of tgate_compile: its manifest's format is ${JSON.stringify(manifest?.format)}. ${COMMAND}`);
  }
  if (!(manifest.schema_version >= 1 && manifest.schema_version <= SCHEMA_VERSION)) {
    throw new BundleError(
      `The bundle's manifest has schema version ${manifest.schema_version}, and this page reads versions up to ${SCHEMA_VERSION}. ` +
        "Write the page anew with a newer tgate_compile.",
    );
  }
  if (manifest.graph_format !== "onnx") {
    throw new BundleError(`The bundle's graphs have the format ${JSON.stringify(manifest.graph_format)}, and browsers run "onnx". ${COMMAND}`);
  }
  if (manifest.components === null) {
    throw new BundleError(
      "The bundle has the denoiser alone, so that there is nothing to read prompts and to decode latents. Export one with " +
        "`tgate-compile export --components all`.",
    );
  }
  if (manifest.family.calls.length) {
    throw new BundleError(`The bundle is of a ${manifest.pipeline.class_name}, whose guidance halves have calls of their own. ${COMMAND}`);
  }
  if (manifest.method.schedule.guidance_similarity !== null) {
    throw new BundleError(`The bundle's guidance ends by likeness (guidance_similarity), which this page does not watch. ${COMMAND}`);
  }
  if (!manifest.method.plans) {
    throw new BundleError("The bundle was written by an older tgate_compile, without the plans that this page reads. Export it again.");
  }
  const source = Object.values(manifest.components.arguments).find((one) => !SOURCES.includes(one));
  if (source !== undefined) throw new BundleError(`The bundle's denoiser asks for ${JSON.stringify(source)}, which this page does not make. ${COMMAND}`);
  checkDtypes(manifest);
  checkBatch(manifest);
  checkFiles(manifest);
  makeScheduler(manifest.scheduler, manifest.components.num_inference_steps); // throws for one that is not here
}

/** Of the values that the steps after the gate reuse, for one image; 0 if nothing is. */
export function cacheBytes(manifest) {
  const sizes = Object.fromEntries(Object.entries(manifest.sizes).map(([name, size]) => [name, size.example]));
  const held = new Map();
  for (const graph of Object.values(manifest.graphs)) {
    for (const { kind, site, dtype, shape } of graph.cache_inputs) {
      const bytes = BYTES[dtype] * shapeAt(shape, sizes).reduce((product, size) => product * size, 1);
      held.set(`${kind} ${site}`, Math.max(bytes, held.get(`${kind} ${site}`) ?? 0));
    }
  }
  return [...held.values()].reduce((sum, bytes) => sum + bytes, 0);
}

/** The numbers of a shape whose free sizes are these. */
export function shapeAt(shape, sizes) {
  return shape.map((size) => (typeof size === "number" ? size : valueOf(size, sizes)));
}

/** `2*b`, `16*(h + 1)//2`: numbers, names, `+ - * //` and brackets, read from the left. */
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
    for (const spec of [...graph.inputs, ...graph.outputs, ...(graph.cache_inputs ?? []), ...(graph.cache_outputs ?? [])]) {
      if (!Object.hasOwn(BYTES, spec.dtype)) {
        throw new BundleError(`${spec.name} of the bundle is ${spec.dtype}, which browsers do not run. Export it in float32 or float16.`);
      }
    }
  }
}

/** This page makes one image at a time. */
function checkBatch(manifest) {
  for (const graph of Object.values(manifest.graphs)) {
    const latents = graph.inputs.find((spec) => spec.name === manifest.denoiser.latents), rows = latents?.shape[0];
    if (typeof rows === "number" && rows !== (graph.phase.guided ? 2 : 1)) {
      throw new BundleError(`The bundle makes several images at a time, and this page makes one: its latents are ${JSON.stringify(latents.shape)}. ${COMMAND}`);
    }
  }
}

/** Files lie in the bundle's folder, and are named with their sizes. */
function checkFiles(manifest) {
  const { text_encoders: encoders, vae_decoder: decoder, weights } = manifest.components;
  const used = [
    manifest.weights, weights, decoder.file,
    ...Object.values(manifest.graphs).map((graph) => graph.file),
    ...encoders.flatMap((encoder) => [encoder.file, encoder.tokenizer.file]),
  ];
  const missing = used.find((name) => !Object.hasOwn(manifest.files, name));
  if (missing !== undefined) throw new BundleError(`The bundle's manifest uses the file ${JSON.stringify(missing)}, but does not name it among its files.`);
  const outside = Object.keys(manifest.files).find((name) => !/^[^/\\:?#%]+(\/[^/\\:?#%]+)*$/.test(name) || name.split("/").some((part) => /^\.+$/.test(part)));
  if (outside !== undefined) throw new BundleError(`The bundle's manifest names the file ${JSON.stringify(outside)}, which is no plain path in its folder.`);
}
