"""Caching methods, one per file. A method defines for each step which values it emits, merges and reuses."""
