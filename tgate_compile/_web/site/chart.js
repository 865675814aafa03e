/** Draw the time of each step as two bars: the plain run, and the gated run in the colors of its strip. */

const HEIGHT = 210, LEFT = 52, RIGHT = 6, TOP = 22, BOTTOM = 22;
/** Bars are cut off at this multiple of the plain run's median, so that one slow step does not flatten all others. */
const MOST = 2.2;
const SVG = "http://www.w3.org/2000/svg";

/**
 * Return the chart as an SVG, `width` pixels wide. `plain` and `gated`: the completed steps of both runs, `{letter, seconds}`;
 * `steps`: the number of steps of each; `gate`: the first step after the gate, or `steps`.
 */
export function chartOf({ plain, gated, steps, gate, width }) {
  const svg = made("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img" });
  const all = [...plain, ...gated].map(({ seconds }) => seconds);
  const reference = medianOf((plain.length ? plain : gated).map(({ seconds }) => seconds));
  const top = ceiling(Math.min(Math.max(...all, 1e-3), reference * MOST || Infinity));
  const slot = (width - LEFT - RIGHT) / steps, bar = Math.max(1, Math.min(13, slot * 0.4)), floor = HEIGHT - BOTTOM;
  const yOf = (seconds) => floor - (floor - TOP) * Math.min(seconds / top, 1), xOf = (step) => LEFT + slot * step;
  for (const share of [0, 0.5, 1]) {
    const y = yOf(top * share);
    svg.append(made("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y, y2: y }));
    svg.append(made("text", { x: LEFT - 7, y: y + 4, "text-anchor": "end" }, milliseconds(top * share)));
  }
  const draw = (step, { letter, seconds }, kind, offset) => {
    const y = yOf(seconds), rectangle = made("rect", { class: kind, x: xOf(step + 0.5) + offset, y, width: bar, height: floor - y, rx: Math.min(2, bar / 3) });
    rectangle.append(made("title", {}, `Step ${step}, ${letter}: ${milliseconds(seconds)}`));
    svg.append(rectangle);
    if (seconds > top) svg.append(made("text", { x: xOf(step + 0.5) + offset + bar / 2, y: TOP - 4, "text-anchor": "middle" }, "\u2191"));
  };
  plain.forEach((step, i) => draw(i, step, "plain", -bar - 0.5));
  gated.forEach((step, i) => draw(i, step, `s-${step.letter.toLowerCase()}`, 0.5));
  const stride = [1, 2, 5, 10, 20, 50].find((one) => one * slot >= 26) ?? 100;
  for (let step = 0; step < steps; step += stride) {
    svg.append(made("text", { x: xOf(step + 0.5), y: HEIGHT - 6, "text-anchor": "middle" }, String(step)));
  }
  if (gate > 0 && gate < steps) {
    const x = xOf(gate), isRight = gate > steps / 2;
    svg.append(made("line", { class: "gate", x1: x, x2: x, y1: 6, y2: floor }));
    svg.append(made("text", { class: "gate-word", x: x + (isRight ? -6 : 6), y: 14, "text-anchor": isRight ? "end" : "start" }, "gate"));
  }
  return svg;
}

/** Return the median, or 0 if there are no values. */
export function medianOf(values) {
  const sorted = [...values].sort((one, other) => one - other), half = sorted.length >> 1;
  if (!sorted.length) return 0;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

/** Format a duration, such as `8.2 ms`, `83 ms` or `1.20 s`. */
export function milliseconds(seconds) {
  if (seconds >= 1) return `${seconds.toFixed(2)} s`;
  const thousandths = seconds * 1e3;
  return `${thousandths > 0 && thousandths < 9.95 ? thousandths.toFixed(1) : thousandths.toFixed(0)} ms`;
}

/** Round up to the next round number. */
function ceiling(value) {
  const unit = 10 ** Math.floor(Math.log10(value));
  return unit * [1, 1.2, 1.6, 2, 2.4, 3, 4, 5, 6, 8, 10].find((one) => one * unit >= value - 1e-12);
}

function made(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}
