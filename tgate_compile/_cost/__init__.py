"""What a schedule costs on the real models, read off their graphs on the meta device: no weights, no runs."""
