"""Graph passes: find the sites of a captured denoiser, emit or reuse their values, remove what is dead.

Everything here knows torch only: no diffusers, no pipelines, no configuration objects.
"""
