/** Decode latents to images. Like `runtime/_text_and_images.py`. */

import { tensor } from "./session.js";
import { floats } from "./text.js";

/** Decode `latents`, Float32Array of `shape` [1, channels, h, w], to `{pixels, width, height}`. The decoder must be open. */
export async function decoded(spec, sessions, runtime, latents, shape) {
  const [input] = spec.inputs, [output] = spec.outputs;
  const scaled = latents.map((latent) => latent / spec.scaling_factor + spec.shift_factor);
  const results = await sessions.get(spec.file).run({ [input.name]: tensor(runtime, input, scaled, shape) }, [output.name]);
  const [, , height, width] = results[output.name].dims, values = floats(results[output.name]);
  const [black, white] = spec.image_range, plane = height * width;
  const pixels = new Uint8ClampedArray(4 * plane).fill(255); // red, green, blue and opacity of each, rounded and clipped
  for (let at = 0; at < plane; at++) {
    for (let colour = 0; colour < 3; colour++) pixels[4 * at + colour] = (255 * (values[colour * plane + at] - black)) / (white - black);
  }
  return { pixels, width, height };
}

/** Return the PSNR of two images in decibels; Infinity if they are equal. */
export function psnr(one, other) {
  let error = 0;
  for (let i = 0; i < one.length; i++) if (i % 4 !== 3) error += (one[i] - other[i]) ** 2;
  return 10 * Math.log10((255 ** 2 * one.length * 0.75) / error);
}
