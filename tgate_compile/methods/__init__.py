"""Caching methods: one file each. A method says for each step what it emits, merges and reuses."""
