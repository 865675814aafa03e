"""Capture a denoiser, derive its variants and compile them with a backend."""
