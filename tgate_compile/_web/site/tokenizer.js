/**
 * Encode texts as token ids, according to a tokenizer.json of the `tokenizers` library.
 *
 * The work is done by tokenizers.min.mjs, which is `dist/tokenizers.min.mjs` of @huggingface/tokenizers 0.2.0 on npm,
 * unchanged; its license is tokenizers.LICENSE.txt. It is a port of the library that treats some characters differently: `\w`
 * and `\s` of a few components are those of ASCII or JavaScript, and a capital sigma at the end of a word becomes a final one.
 * Different tokens would give a different image, so `EXACT` lists the components with the same result in both, and rewrites
 * others in terms of these. Components that it does not list are rejected.
 */

import { BundleError } from "./errors.js";
import { Tokenizer as Library } from "./tokenizers.min.mjs";

const SPACE = "\\p{White_Space}";
const WORD = "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\p{Join_Control}"; // `\w` of Rust's regular expressions
const BYTE_LEVEL_WORDS = `'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^${SPACE}\\p{L}\\p{N}]+|${SPACE}+(?!\\P{White_Space})|${SPACE}+`;

/** The keys that error messages leave out. */
const BULKY = ["vocab", "merges", "precompiled_charsmap"];

/** By part of the file and type, a definition that gives the same tokens in the port, or null if there is none. */
const EXACT = {
  normalizer: {
    Sequence: (data) => ({ ...data, normalizers: data.normalizers.map((one) => exact("normalizer", one)) }),
    NFC: (data) => data,
    NFD: (data) => data,
    NFKC: (data) => data,
    NFKD: (data) => data,
    Lowercase: (data) => ({ type: "Sequence", normalizers: [{ type: "Replace", pattern: { String: "Σ" }, content: "σ" }, data] }),
    Replace: (data) => ({ ...data, content: data.content.replaceAll("$", "$$$$") }), // `$` is special in the port
  },
  pre_tokenizer: {
    Sequence: (data) => ({ ...data, pretokenizers: data.pretokenizers.map((one) => exact("pre_tokenizer", one)) }),
    Split: (data) => (data.behavior === "Removed" && data.invert ? data : null),
    Whitespace: () => pieces(`[${WORD}]+|[^${WORD}${SPACE}]+`),
    WhitespaceSplit: () => pieces(`[^${SPACE}]+`),
    ByteLevel: (data) => (data.add_prefix_space ? null : data.use_regex === false ? data : inTurn(pieces(BYTE_LEVEL_WORDS), { ...data, use_regex: false })),
    Metaspace: (data) => (data.replacement === "▁" && data.prepend_scheme === "always" && data.split ? inTurn(data, pieces("▁[^▁]*|[^▁]+")) : null),
  },
  model: {
    BPE: (data) => (data.dropout || data.byte_fallback || data.continuing_subword_prefix || data.fuse_unk ? null : data),
    Unigram: (data) => (data.byte_fallback ? null : data),
    WordLevel: (data) => data,
  },
};

export class Tokenizer {
  #added;
  #addedPattern;
  #library;
  #frame;
  #truncation;
  #padding;

  /** `data` is the JSON of the file. Throws BundleError if the tokens might differ from those of the library. */
  constructor(data) {
    const added = data.added_tokens ?? [];
    const odd = added.find((token) => token.single_word || token.lstrip || token.rstrip);
    if (odd) throw unsupported("added token", JSON.stringify(odd));
    // The port would also find these in texts that contain them only after normalization, such as "<|ENDOFTEXT|>".
    this.#added = new Map(added.filter((token) => !token.normalized).map((token) => [token.content, token.id]));
    this.#addedPattern = anyOf([...this.#added.keys()]);
    const parts = Object.fromEntries(Object.keys(EXACT).map((part) => [part, exact(part, data[part])]));
    const file = { added_tokens: added.filter((token) => token.normalized), ...parts, post_processor: null, decoder: null };
    try {
      this.#library = new Library(file, { unk_token: data.model.unk_token });
    } catch (error) {
      throw unsupported("definition", `that cannot be read (${error.message})`);
    }
    this.#frame = frameOf(data.post_processor);
    this.#truncation = data.truncation;
    this.#padding = data.padding;
    if (this.#padding && !Number.isInteger(this.#padding.strategy?.Fixed)) throw unsupported("padding", JSON.stringify(this.#padding.strategy));
  }

  /** Return the arrays `ids` and `mask` (1 for a token, 0 for padding), and `cut`, whether `text` was truncated. */
  encode(text) {
    let ids = text.split(this.#addedPattern).flatMap((part) => this.#added.get(part) ?? this.#library.encode(part).ids);
    const [before, after] = this.#frame, most = this.#truncation ? this.#truncation.max_length - before.length - after.length : Infinity;
    const cut = ids.length > most;
    if (cut) ids = this.#truncation.direction === "Left" ? ids.slice(-most) : ids.slice(0, most);
    ids = [...before, ...ids, ...after];
    const padding = Array(Math.max(0, (this.#padding?.strategy.Fixed ?? 0) - ids.length)).fill(this.#padding?.pad_id);
    const mask = [ids.map(() => 1), padding.map(() => 0)];
    const [first, second] = this.#padding?.direction === "Left" ? [padding, ids] : [ids, padding];
    return { ids: [...first, ...second], mask: first === ids ? mask.flat() : mask.reverse().flat(), cut };
  }
}

/** Return a regular expression that splits a text at `words` and keeps these; at each position, the longest word matches. */
function anyOf(words) {
  const escaped = words.map((word) => word.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"));
  return words.length ? new RegExp(`(${escaped.sort((a, b) => b.length - a.length).join("|")})`, "u") : undefined;
}

/** Return a part of the file for the port. Throws BundleError unless it is known to give the same tokens there. */
function exact(part, data) {
  if (!data && part !== "model") return null;
  const found = Object.hasOwn(EXACT[part], data.type) ? EXACT[part][data.type](data) : null;
  if (found === null) throw unsupported(part.replace("_", "-"), JSON.stringify(data, (key, value) => (BULKY.includes(key) ? undefined : value)));
  return found;
}

/** Return a pre-tokenizer that keeps the matches of a regular expression, and drops the text between them. */
function pieces(regex) {
  return { type: "Split", pattern: { Regex: regex }, behavior: "Removed", invert: true };
}

function inTurn(...pretokenizers) {
  return { type: "Sequence", pretokenizers };
}

/** Return the ids before and after those of a text. The port would look up their names, which the vocabulary may lack. */
function frameOf(data) {
  if (!data || data.type === "ByteLevel") return [[], []];
  if (data.type === "RobertaProcessing") return [[data.cls[1]], [data.sep[1]]];
  if (data.type !== "TemplateProcessing") throw unsupported("post-processor", data.type);
  const text = data.single.findIndex((part) => "Sequence" in part);
  const idsOf = (parts) => parts.flatMap((part) => data.special_tokens[part.SpecialToken.id].ids);
  return [idsOf(data.single.slice(0, text)), idsOf(data.single.slice(text + 1))];
}

function unsupported(what, given) {
  return new BundleError(
    `This page does not support the bundle's tokenizer, because of its ${what} ${given}. Export a bundle of Stable Diffusion or ` +
      "SDXL, or run this one with `tgate-compile run`.",
  );
}
