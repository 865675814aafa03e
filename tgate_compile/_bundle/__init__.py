"""Bundles: a schedule's graphs and their weights in a folder, for ONNX Runtime and others (docs/bundle.md)."""
