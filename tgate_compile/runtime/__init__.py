"""Bundles as text-to-image programs on numpy and ONNX Runtime: no torch, diffusers or transformers is imported here."""
