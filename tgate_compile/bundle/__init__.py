"""Bundles: an optimized pipeline's graphs on disk."""
