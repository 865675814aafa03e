/** The noise levels at the timesteps that a denoiser was trained with. Like `runtime/_noise.py`. */

/** Replaces the last of the cumulative products if zero terminal SNR makes it 0: its sigma would be infinite. */
const NEARLY_ZERO = 2 ** -24;
const { fround } = Math;

/**
 * Return the cumulative products of `1 - beta` for each training timestep, Float32Array.
 * Intermediate values are rounded to float32 where diffusers does it, so that results agree.
 */
export function cumulativeAlphas(config) {
  let given = betas(config);
  if (config.rescale_betas_zero_snr) given = withZeroTerminalSnr(given);
  return products(given);
}

/** Return the same products, with a last one that is not 0. */
export function alphasAboveZero(config) {
  const alphas = cumulativeAlphas(config);
  if (config.rescale_betas_zero_snr) alphas[alphas.length - 1] = NEARLY_ZERO;
  return alphas;
}

/** Return the noise's standard deviation relative to the signal, Float32Array, ascending. */
export function sigmasOf(alphas) {
  return alphas.map((alpha) => Math.sqrt(fround(fround(1 - alpha) / alpha)));
}

/** Return `count` descending sigmas, most of them small (arXiv 2206.00364, equation 5, with rho 7). */
export function karrasSigmas(largest, smallest, count) {
  const first = largest ** (1 / 7), last = smallest ** (1 / 7);
  return linspace(0, 1, count).map((ramp) => (first + ramp * (last - first)) ** 7);
}

/** Return the timesteps, with fractions, at which the interpolated sigmas in `training` equal `sigmas`. */
export function timestepsOf(sigmas, training) {
  const logs = training.map(Math.log);
  return sigmas.map((sigma) => {
    const target = Math.log(Math.max(sigma, 1e-10));
    const above = logs.findIndex((log) => log > target);
    const low = Math.min(Math.max((above < 0 ? logs.length : above) - 1, 0), logs.length - 2);
    const weight = Math.min(Math.max((logs[low] - target) / (logs[low] - logs[low + 1]), 0), 1);
    return (1 - weight) * low + weight * (low + 1);
  });
}

/** Interpolate `values` at fractional positions, like numpy.interp. */
export function interpolated(positions, values) {
  return positions.map((position) => {
    const at = Math.min(Math.max(position, 0), values.length - 1), low = Math.min(Math.floor(at), values.length - 2);
    return values[low] + (at - low) * (values[low + 1] - values[low]);
  });
}

/** Return `count` evenly spaced numbers, like numpy.linspace. */
export function linspace(start, stop, count) {
  const step = count > 1 ? (stop - start) / (count - 1) : 0;
  return Array.from({ length: count }, (_, i) => (i === count - 1 && count > 1 ? stop : start + i * step));
}

/** Round to the nearest integer, halves to the even one, like numpy. */
export function roundToEven(value) {
  const low = Math.floor(value), rest = value - low;
  return rest > 0.5 || (rest === 0.5 && low % 2 !== 0) ? low + 1 : low;
}

/** Return the numbers from `start` down to 0, exclusive, in steps of `stride`, like numpy.arange(start, 0, -stride). */
export function countdown(start, stride) {
  return Array.from({ length: Math.ceil(start / stride) }, (_, i) => start - i * stride);
}

function betas(config) {
  const { beta_start: start, beta_end: end, num_train_timesteps: count } = config;
  if (config.trained_betas !== null) return Float32Array.from(config.trained_betas);
  if (config.beta_schedule === "squaredcos_cap_v2") {
    const level = (i) => Math.cos((((i / count + 0.008) / 1.008) * Math.PI) / 2) ** 2;
    return Float32Array.from({ length: count }, (_, i) => Math.min(1 - level(i + 1) / level(i), 0.999));
  }
  if (config.beta_schedule === "scaled_linear") {
    return Float32Array.from(linspace(start ** 0.5, end ** 0.5, count)).map((root) => root * root);
  }
  return Float32Array.from(linspace(start, end, count));
}

/** Rescale betas to zero terminal SNR (arXiv 2305.08891, algorithm 1). */
function withZeroTerminalSnr(given) {
  const roots = products(given).map(Math.sqrt);
  const first = roots[0], last = roots[roots.length - 1], scale = fround(first / fround(first - last));
  const rescaled = roots.map((root) => fround(fround(root - last) * scale) ** 2);
  return rescaled.map((product, i) => 1 - (i === 0 ? product : fround(product / rescaled[i - 1])));
}

function products(given) {
  let product = 1;
  return given.map((beta) => (product *= fround(1 - beta)));
}
