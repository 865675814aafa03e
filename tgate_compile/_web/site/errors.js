/** A mistake that the page can explain: its message says what was given, what was expected and what to do. */
export class BundleError extends Error {
  name = "BundleError";
}
