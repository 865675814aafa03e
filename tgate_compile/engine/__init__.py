"""From a denoiser's call to compiled graphs: capture, variants, backends."""
