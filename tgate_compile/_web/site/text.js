/** Encode prompts for the denoiser. Like `runtime/_text_and_images.py`. */

import { BundleError } from "./errors.js";
import { fromFloat16 } from "./float16.js";
import { tensor } from "./session.js";
import { Tokenizer } from "./tokenizer.js";

/** The text encoders of a bundle, with their tokenizers. */
export class Prompts {
  #components;
  #files;
  #sessions;
  #runtime;
  #tokenizers = new Map();

  constructor(components, files, sessions, runtime) {
    this.#components = components;
    this.#files = files;
    this.#sessions = sessions;
    this.#runtime = runtime;
  }

  /** Return `hidden_states`, [1, tokens, dim], and `attention_mask` and `pooled` if there are, as `{values, shape}` by source. */
  async encoded(text, onCut = () => {}) {
    const parts = [];
    for (const spec of this.#components.text_encoders) parts.push(await this.#encodedBy(spec, text, onCut));
    const joined = Object.assign({}, ...parts);
    for (const source of ["hidden_states", "pooled"]) {
      const given = parts.map((part) => part[source]).filter(Boolean);
      if (given.length) joined[source] = joinedLast(given);
    }
    return joined;
  }

  /** Return the encodings of a negative prompt; null stands for a missing one, with the shapes of `prompt`. */
  async negative(text, prompt) {
    if (text !== null) return this.encoded(text);
    if (this.#components.negative !== "zeros") return this.encoded("");
    return Object.fromEntries(
      Object.entries(prompt).map(([source, { values, shape }]) => [source, { values: new values.constructor(values.length), shape }]),
    );
  }

  async #encodedBy(spec, text, onCut) {
    const { file, length, lower_case: lower } = spec.tokenizer;
    if (!this.#tokenizers.has(file)) this.#tokenizers.set(file, new Tokenizer(await this.#files.json(file)));
    const { ids, mask, cut } = this.#tokenizers.get(file).encode(lower ? text.toLowerCase().trim() : text);
    if (ids.length !== length) throw new BundleError(`${file} encodes a text as ${ids.length} tokens, but the manifest says ${length}.`);
    if (cut) onCut(length);
    const tokens = { input_ids: ids, attention_mask: mask };
    const feeds = Object.fromEntries(spec.inputs.map((one) => [one.name, tensor(this.#runtime, one, tokens[one.name], [1, length])]));
    const outputs = await this.#sessions.get(spec.file).run(feeds, spec.outputs.map((one) => one.name));
    const made = Object.fromEntries(Object.entries(outputs).map(([name, value]) => [name, { values: floats(value), shape: value.dims }]));
    if ("attention_mask" in feeds) made.attention_mask = { values: mask, shape: [1, length] };
    return made;
  }
}

/** Return a copy of a tensor's values as Float32Array. */
export function floats(value) {
  return value.type === "float16" ? fromFloat16(value.data) : Float32Array.from(value.data);
}

function joinedLast(parts) {
  if (parts.length === 1) return parts[0];
  const widthOf = ({ shape }) => shape[shape.length - 1], outer = parts[0].shape.slice(0, -1);
  const rows = outer.reduce((product, size) => product * size, 1), width = parts.reduce((sum, part) => sum + widthOf(part), 0);
  const values = new Float32Array(rows * width);
  let from = 0;
  for (const part of parts) {
    const own = widthOf(part);
    for (let row = 0; row < rows; row++) values.set(part.values.subarray(row * own, (row + 1) * own), row * width + from);
    from += own;
  }
  return { values, shape: [...outer, width] };
}
