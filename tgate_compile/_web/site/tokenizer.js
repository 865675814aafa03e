/**
 * What makes numbers of a text: a tokenizer.json of the `tokenizers` library, as far as CLIP's tokenizers and the embedded
 * models' go. Whatever else such a file may ask for is refused by name.
 */

import { BundleError } from "./errors.js";
import { modelOf } from "./tokenizer_models.js";

/** How byte-level tokenizers cut words; the library's own. */
const BYTE_LEVEL_WORDS = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;
/** The library's `\w+|[^\w\s]+`, as Rust understands it. */
const WORDS = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]+|[^\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}\p{White_Space}]+/gu;
const BYTE_LETTERS = byteLetters();

export class Tokenizer {
  #added;
  #addedPattern;
  #normalize;
  #cut;
  #model;
  #frame;
  #truncation;
  #padding;

  /** `data` is what the file has as JSON. Throws BundleError for what is not written here. */
  constructor(data) {
    const rules = (data.added_tokens ?? []).filter((token) => token.single_word || token.lstrip || token.rstrip || token.normalized);
    if (rules.length) throw unknown("added token", `${rules[0].content} with rules of its own`);
    this.#added = new Map((data.added_tokens ?? []).map((token) => [token.content, token.id]));
    this.#addedPattern = this.#added.size ? new RegExp(`(${[...this.#added.keys()].map(escaped).join("|")})`, "u") : null;
    this.#normalize = normalizerOf(data.normalizer);
    this.#cut = preTokenizerOf(data.pre_tokenizer);
    this.#model = modelOf(data.model);
    this.#frame = postProcessorOf(data.post_processor);
    this.#truncation = data.truncation;
    this.#padding = data.padding;
    if (this.#padding && !Number.isInteger(this.#padding.strategy?.Fixed)) throw unknown("padding", JSON.stringify(this.#padding.strategy));
  }

  /** `ids` and `mask` (1 for a token, 0 for padding), both arrays, and whether the end of `text` was `cut` off. */
  encode(text) {
    let ids = [];
    for (const part of this.#addedPattern ? text.split(this.#addedPattern) : [text]) {
      if (this.#added.has(part)) ids.push(this.#added.get(part));
      else if (part) for (const piece of this.#cut([this.#normalize(part)])) ids.push(...this.#model(piece));
    }
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

function normalizerOf(data) {
  if (!data) return (text) => text;
  switch (data.type) {
    case "Sequence": {
      const all = data.normalizers.map(normalizerOf);
      return (text) => all.reduce((given, one) => one(given), text);
    }
    case "NFC": case "NFD": case "NFKC": case "NFKD":
      return (text) => text.normalize(data.type);
    case "Lowercase":
      return (text) => Array.from(text, (letter) => letter.toLowerCase()).join(""); // letter by letter: no final sigma
    case "Replace": {
      const pattern = patternOf(data.pattern);
      return (text) => text.replace(pattern, () => data.content);
    }
    default:
      throw unknown("normalizer", data.type);
  }
}

/** From a list of pieces to a list of smaller ones. */
function preTokenizerOf(data) {
  if (!data) return (pieces) => pieces;
  switch (data.type) {
    case "Sequence": {
      const all = data.pretokenizers.map(preTokenizerOf);
      return (pieces) => all.reduce((given, one) => one(given), pieces);
    }
    case "Split": {
      if (data.behavior !== "Removed" || !data.invert) throw unknown("pre-tokenizer", `Split with ${data.behavior}`);
      const pattern = patternOf(data.pattern);
      return (pieces) => pieces.flatMap((piece) => piece.match(pattern) ?? []);
    }
    case "ByteLevel":
      if (data.add_prefix_space) throw unknown("pre-tokenizer", "ByteLevel with a space in front");
      return (pieces) => pieces.flatMap((piece) => (data.use_regex ? piece.match(BYTE_LEVEL_WORDS) ?? [] : [piece]).map(asBytes));
    case "Whitespace":
      return (pieces) => pieces.flatMap((piece) => piece.match(WORDS) ?? []);
    default:
      throw unknown("pre-tokenizer", data.type);
  }
}

/** The tokens that are put before and after those of a text. */
function postProcessorOf(data) {
  if (!data || data.type === "ByteLevel") return [[], []];
  if (data.type === "RobertaProcessing") return [[data.cls[1]], [data.sep[1]]];
  if (data.type !== "TemplateProcessing") throw unknown("post-processor", data.type);
  const text = data.single.findIndex((part) => "Sequence" in part);
  const idsOf = (parts) => parts.flatMap((part) => data.special_tokens[part.SpecialToken.id].ids);
  return [idsOf(data.single.slice(0, text)), idsOf(data.single.slice(text + 1))];
}

/** Oniguruma's `\s` is Unicode's white space, JavaScript's is not quite. */
function patternOf({ String: text, Regex: regex }) {
  return text === undefined ? new RegExp(regex.replaceAll("\\s", "\\p{White_Space}"), "gu") : new RegExp(escaped(text), "gu");
}

function escaped(text) {
  return text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");
}

function asBytes(piece) {
  return Array.from(new TextEncoder().encode(piece), (byte) => BYTE_LETTERS[byte]).join("");
}

/** A letter that can be seen for each byte. Source: GPT-2's encoder.py, `bytes_to_unicode`. */
function byteLetters() {
  const isPlain = (byte) => (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
  let others = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(isPlain(byte) ? byte : others++));
}

function unknown(what, name) {
  return new BundleError(
    `The bundle's tokenizer has a ${what} that is not on this page: ${name}. The page has those of CLIP: export a bundle of ` +
      "Stable Diffusion or SDXL, or run this one with `tgate-compile run`.",
  );
}
