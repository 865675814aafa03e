"""Exporters: variants of a denoiser, written for other runtimes. None has been written yet."""
