"""Bundles: the graphs of an optimized pipeline, stored on disk."""
