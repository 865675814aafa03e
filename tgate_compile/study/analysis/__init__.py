"""When attentions settle."""

#: What counts as converged: the fraction of the way from the smallest change up to the largest.
CONVERGED_WITHIN = 0.1
