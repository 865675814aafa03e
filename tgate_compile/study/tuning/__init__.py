"""Choose a schedule by measuring."""

#: The drift of the final latents that `tune` allows by default, as a fraction of their norm.
DEFAULT_TOLERANCE = 0.1
