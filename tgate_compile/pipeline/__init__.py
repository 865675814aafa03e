"""Follow a pipeline's generation, and run its denoisers by a schedule."""
