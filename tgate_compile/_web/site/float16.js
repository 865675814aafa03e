/** Convert to and from half precision. Not all browsers have Float16Array; for others ONNX Runtime accepts the bits. */

const Halves = globalThis.Float16Array;

/** Convert numbers to half precision: Float16Array, or Uint16Array of the bits. */
export function toFloat16(values) {
  return Halves ? Halves.from(values) : Uint16Array.from(values, bitsOf);
}

/** Convert half precision to Float32Array. */
export function fromFloat16(halves) {
  return halves instanceof Uint16Array ? Float32Array.from(halves, valueOf) : Float32Array.from(halves);
}

function valueOf(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : (fraction / 1024) * 2 ** -14);
}

/** Return the bits of a number rounded to half precision, halves to the even one. */
function bitsOf(value) {
  const sign = value < 0 || Object.is(value, -0) ? 0x8000 : 0, size = Math.abs(value);
  if (Number.isNaN(size)) return 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  const exponent = size < 2 ** -14 ? -14 : Math.floor(Math.log2(size)), unit = 2 ** (exponent - 10);
  const whole = size / unit, low = Math.floor(whole), rest = whole - low;
  const rounded = rest > 0.5 || (rest === 0.5 && low % 2) ? low + 1 : low;
  return sign | (exponent === -14 ? rounded : ((exponent + 14) << 10) + rounded); // a carry increments the exponent
}
