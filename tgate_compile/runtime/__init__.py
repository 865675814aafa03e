"""Bundles as text-to-image programs, on numpy and ONNX Runtime: nothing here imports PyTorch, diffusers or transformers."""
