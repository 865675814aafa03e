"""Graph passes: find the sites of a captured denoiser, emit or reuse their values, and remove dead code.

The passes depend on torch and on the phases of schedules, but not on diffusers, pipelines or configuration objects.
"""
