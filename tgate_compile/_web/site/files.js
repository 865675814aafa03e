/** Fetch the files of a bundle, and compare them with the manifest. */

import { BundleError } from "./errors.js";

export class Files {
  #base;
  #expected;
  #onBytes;

  /** `base`: the bundle's address; `expected`: `files` of the manifest; `onBytes`: called with the length of each piece. */
  constructor(base, expected, onBytes) {
    this.#base = base;
    this.#expected = expected;
    this.#onBytes = onBytes;
  }

  /** Return the bytes of a file, Uint8Array. Throws BundleError unless it is the one that the manifest describes. */
  async bytes(name) {
    const bytes = await fetched(new URL(name, this.#base), this.#onBytes);
    const { size, sha256 } = this.#expected[name];
    if (bytes.length !== size) {
      throw new BundleError(`${name} has ${bytes.length} bytes, but the manifest says ${size}. The copy is not complete, or it has been changed.`);
    }
    // Browsers have crypto.subtle only in secure contexts: over https, and on this machine.
    if (globalThis.crypto?.subtle && (await hashOf(bytes)) !== sha256) {
      throw new BundleError(`${name} has been changed: its SHA-256 is not the one in the manifest.`);
    }
    return bytes;
  }

  /** Return the content of a JSON file. */
  async json(name) {
    return JSON.parse(new TextDecoder().decode(await this.bytes(name)));
  }
}

/** Fetch `url` as Uint8Array; `onBytes` is called with the length of each piece. */
export async function fetched(url, onBytes = () => {}) {
  let response;
  try {
    response = await fetch(url);
  } catch (error) {
    throw new BundleError(`${url} could not be loaded: ${error.message}.`);
  }
  if (!response.ok) throw new BundleError(`${url} could not be loaded: ${response.status} ${response.statusText}`.trim() + ".");
  const pieces = [];
  let length = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    pieces.push(value);
    length += value.length;
    onBytes(value.length);
  }
  if (pieces.length === 1) return pieces[0];
  const whole = new Uint8Array(length);
  let at = 0;
  for (const piece of pieces.splice(0)) {
    whole.set(piece, at);
    at += piece.length;
  }
  return whole;
}

async function hashOf(bytes) {
  const hash = await crypto.subtle.digest("SHA-256", bytes);
  return Array.from(new Uint8Array(hash), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
