/** From a piece of text to tokens: byte pair encoding, and whole words. */

import { BundleError } from "./errors.js";

/** A function from a piece to its token ids. Throws BundleError for another model. */
export function modelOf(data) {
  if (data.type === "BPE" && !data.dropout && !data.byte_fallback && !data.continuing_subword_prefix && !data.fuse_unk) {
    return bytePairs(data);
  }
  if (data.type === "WordLevel") {
    const { vocab, unk_token: unknown } = data;
    return (piece) => [Object.hasOwn(vocab, piece) ? vocab[piece] : vocab[unknown]];
  }
  throw new BundleError(
    `The bundle's tokenizer is a model that is not on this page: ${data.type}. The page has CLIP's byte pairs, and whole ` +
      "words. Run the bundle with `tgate-compile run`.",
  );
}

/** Source: Sennrich et al., arXiv 1508.07909, algorithm 1; on ids, as the library does it. */
function bytePairs({ vocab, merges, unk_token: unknown, end_of_word_suffix: suffix, ignore_merges: wholeFirst }) {
  const idOf = (token) => (Object.hasOwn(vocab, token) ? vocab[token] : undefined);
  const ranks = new Map(
    merges.map((merge, rank) => {
      const [left, right] = Array.isArray(merge) ? merge : merge.split(" ");
      return [`${idOf(left)} ${idOf(right)}`, { rank, id: idOf(left + right) }];
    }),
  );
  const known = new Map();
  return (piece) => {
    if (known.has(piece)) return known.get(piece);
    const letters = [...piece];
    let ids = wholeFirst && idOf(piece) !== undefined ? [idOf(piece)] : null;
    ids ??= letters
      .map((letter, i) => idOf(i === letters.length - 1 ? letter + (suffix ?? "") : letter) ?? idOf(unknown))
      .filter((id) => id !== undefined);
    for (;;) {
      let best = null;
      for (let i = 0; i + 1 < ids.length; i++) {
        const merge = ranks.get(`${ids[i]} ${ids[i + 1]}`);
        if (merge && (best === null || merge.rank < best.rank)) best = { ...merge, at: i };
      }
      if (best === null) break;
      ids.splice(best.at, 2, best.id);
    }
    known.set(piece, ids);
    return ids;
  };
}
