"""Analyze when the attentions of a pipeline converge."""

#: The threshold for convergence, as a fraction of the range from the smallest to the largest change.
CONVERGED_WITHIN = 0.1
