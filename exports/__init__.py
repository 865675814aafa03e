"""Exporters: variants of a denoiser, converted for other runtimes. a module for each."""
