/** An error with a message for the user, which says what was given, what was expected and what to do. */
export class BundleError extends Error {
  name = "BundleError";
}
