"""Exporters: variants of a denoiser, converted for other runtimes. ONNX is the only one so far."""
