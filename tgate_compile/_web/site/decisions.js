/** Decide at run time whether the blocks of a step are computed or skipped. Like `methods/decisions.py`. */

/** Decides the steps of one generation, in order, by the `rule` in the manifest. */
export class Decider {
  #rule;
  #total = 0;
  #inRow = 0;
  #skipped = 0;

  constructor(rule) {
    this.#rule = rule;
  }

  /** Return whether to skip the blocks of a step with this measure. If it is NaN, they are computed. */
  skips(measure) {
    const { threshold, at_threshold: atThreshold, coefficients, accumulates, most_in_row: mostInRow, most } = this.#rule;
    if (coefficients.length) measure = coefficients.reduce((value, coefficient) => value * measure + coefficient, 0);
    if (accumulates) measure = this.#total += measure;
    const isSkipped =
      (measure < threshold || (atThreshold && measure === threshold)) &&
      (mostInRow === null || this.#inRow < mostInRow) &&
      (most === null || this.#skipped < most);
    if (!isSkipped) {
      this.computed();
      return false;
    }
    this.#inRow++;
    this.#skipped++;
    return true;
  }

  /** Note that a step has been computed. */
  computed() {
    this.#total = 0;
    this.#inRow = 0;
  }
}

/** Return the weights of the values of `steps`, newest first, for a forecast. Like `forecast_weights` in `methods/method.py`. */
export function forecastWeights(steps, step) {
  // The differences of one order after the other at each value, as weights of the values.
  let differences = steps.map((_, i) => steps.map((_, j) => Number(i === j)));
  const weights = [...differences[0]];
  for (let order = 1; order < steps.length; order++) {
    const next = (i) => differences[i].map((value, j) => (value - differences[i + 1][j]) / (steps[i] - steps[i + 1]));
    differences = differences.slice(1).map((_, i) => next(i));
    const factor = (step - steps[0]) ** order / (order === 1 ? 1 : 2); // divided by the factorial; the order is at most 2
    differences[0].forEach((difference, j) => (weights[j] += factor * difference));
  }
  return weights;
}
