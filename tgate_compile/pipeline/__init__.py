"""Follow a pipeline's generation, and run its denoisers according to a schedule."""
