"""Times ways to run a pipeline side by side: one process, the same weights, in alternation."""
